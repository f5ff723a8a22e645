"""Tables of measured peaks: recognised by their columns, read into rows, grouped into tasks.

Invariant: two rows with the same key have the same prediction, whatever was measured.
"""

from __future__ import annotations

import csv
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from autobatch.support.units import MIB
from reports.common.journal import Record


class TableError(ValueError):
    """A table that cannot be read, in words for the user."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A kind of table, and what is known of the runs in it.

    Attributes:
        columns: those that it is recognised by.
        context_bytes: what a process holds outside of the allocator; None takes the card's in the
            catalogue.
    """

    name: str
    columns: tuple[str, ...]
    gpu: str
    optimizer: str
    precision: str
    context_bytes: int | None


KINDS = {
    kind.name: kind
    for kind in (
        Kind(
            name="timm-peaks",
            columns=("model", "batch", "nvidia_smi_peak_mib", "usable"),
            gpu="a100-40gb",
            optimizer="sgd-momentum",
            precision="fp32",
            context_bytes=1775 * MIB,
        ),
        Kind(
            name="max-batch",
            columns=("model", "train_batch_size", "train_img_size"),
            gpu="rtx-3090",
            optimizer="sgd-momentum",
            precision="fp16",
            context_bytes=None,
        ),
        Kind(
            name="xmem",
            columns=("gpu", "total_gpu_bytes", "model", "batch", "optimizer", "ground_nvml_bytes"),
            gpu="the table's",
            optimizer="the table's",
            precision="fp32",
            context_bytes=0,  # the first sample, which is subtracted, seems to hold it
        ),
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How the runs of a table are simulated; the columns of a table win over these.

    Attributes:
        context_bytes: None takes the card's in the catalogue.
    """

    gpu: str
    optimizer: str
    precision: str
    context_bytes: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What the runs of a model have in common; executed once for all their micro-batches.

    Attributes:
        capacity_bytes: of the card, where the table tells it.
        image_size: side in pixels; None for the model's own.
        ceiling_context_bytes: of a search for the largest micro-batch, which depends on it; 0
            takes the card's in the catalogue, None stands for no search.
    """

    kind: str
    model: str
    gpu: str
    optimizer: str
    precision: str
    capacity_bytes: int | None = None
    image_size: int | None = None
    ceiling_context_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One measured run.

    Attributes:
        micro_batch: that was measured, or the largest that ran.
        measured_bytes: None where only the largest micro-batch is known, or it ran out of memory.
        ran_out: whether the run failed for lack of memory.
    """

    run: Run
    micro_batch: int
    measured_bytes: int | None = None
    ran_out: bool = False

    @property
    def key(self) -> str:
        """Name everything that the prediction depends on."""
        asked = None if self.run.ceiling_context_bytes is not None else self.micro_batch
        return "|".join(str(value) for value in (*asdict(self.run).values(), asked))


def recognise(columns: Sequence[str]) -> Kind:
    """Return the kind of a table from its columns.

    Raises:
        TableError: no kind has these columns.
    """
    for kind in KINDS.values():
        if set(kind.columns) <= set(columns):
            return kind
    known = "; ".join(", ".join(kind.columns) for kind in KINDS.values())
    raise TableError(f"the columns {', '.join(columns)} are of no known kind of table: {known}")


def read_records(path: Path) -> tuple[Kind, list[Record]]:
    """Read a CSV file.

    Raises:
        TableError: it is no table of a known kind.
    """
    columns, records = read_csv(path)
    return recognise(columns), records


def read_csv(path: Path) -> tuple[Sequence[str], list[Record]]:
    """Read the columns and records of a CSV file.

    Raises:
        TableError: it cannot be read.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream)
            records: list[Record] = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise TableError(f"cannot read {path}: {error}") from error
    return reader.fieldnames or (), records


def rows_of(kind: Kind, records: Iterable[Mapping[str, str]], settings: Settings) -> list[Row]:
    """Turn records into rows; those that a table marks as unusable are left out.

    Raises:
        TableError: a figure is missing or no number; the message has its line.
    """
    read = {"timm-peaks": _timm_peak, "max-batch": _max_batch, "xmem": _xmem}[kind.name]
    rows = []
    for line, record in enumerate(records, start=2):
        try:
            row = read(record, settings)
        except (ValueError, TypeError, KeyError) as error:
            raise TableError(f"line {line} cannot be read: {error!r}") from error
        if row is not None:
            rows.append(row)
    return rows


def _timm_peak(record: Mapping[str, str], settings: Settings) -> Row | None:
    if not _is_true(record["usable"]):
        return None
    return Row(
        run=_run("timm-peaks", record["model"], settings),
        micro_batch=_whole(record["batch"]),
        measured_bytes=int(float(record["nvidia_smi_peak_mib"]) * MIB),
    )


def _max_batch(record: Mapping[str, str], settings: Settings) -> Row:
    return Row(
        run=_run(
            "max-batch",
            record["model"],
            settings,
            image_size=_whole(record["train_img_size"]),
            ceiling_context_bytes=settings.context_bytes or 0,
        ),
        micro_batch=_whole(record["train_batch_size"]),
    )


def _xmem(record: Mapping[str, str], settings: Settings) -> Row:
    ran_out = _is_true(record.get("real_oom") or "0")
    return Row(
        run=_run(
            "xmem",
            record["model"],
            settings,
            gpu=record["gpu"],
            optimizer=record["optimizer"].lower(),
            capacity_bytes=_whole(record["total_gpu_bytes"]),
        ),
        micro_batch=_whole(record["batch"]),
        measured_bytes=None if ran_out else _whole(record["ground_nvml_bytes"]),
        ran_out=ran_out,
    )


def _run(kind: str, model: str, settings: Settings, **known: Any) -> Run:
    common = {"gpu": settings.gpu, "optimizer": settings.optimizer}
    return Run(kind=kind, model=model, precision=settings.precision, **(common | known))


def _whole(text: str) -> int:
    value = float(text)
    if value <= 0 or value != int(value):
        raise ValueError(f"{text!r} is not a positive whole number")
    return int(value)


def _is_true(text: str) -> bool:
    return text.strip().lower() in ("true", "1", "1.0", "yes")


def sample(rows: Sequence[Row], count: int | None) -> list[Row]:
    """Draw some rows, the same ones every time; all of them for None."""
    if count is None or count >= len(rows):
        return list(rows)
    chosen = random.Random(0).sample(range(len(rows)), count)
    return [rows[index] for index in sorted(chosen)]


def tasks_of(rows: Iterable[Row], done: Iterable[str] = ()) -> list[Record]:
    """Group the rows that are not done: one task per model and way of running it."""
    finished = set(done)
    keys: dict[Run, dict[str, int]] = {}
    for row in rows:
        if row.key not in finished:
            keys.setdefault(row.run, {})[row.key] = row.micro_batch
    return [{"run": asdict(run), "keys": found} for run, found in keys.items()]
