"""What is known of a measured step: all that a prediction needs, or why there is none.

Invariant: what a row does not say is an assumption that is listed, or makes the row incomplete.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from autobatch.support.units import GIB

Metric = Literal["allocated", "reserved"]
COLUMNS = (
    "set source model config gpu world_size sharding precision optimizer batch_per_gpu "
    "seq_or_image accumulation checkpointing compile measured_gib meaning torch notes "
    "url_or_repo_path"
).split()


def is_table_of_steps(columns: Iterable[str]) -> bool:
    """Whether these are the columns of a table of measured steps."""
    return set(COLUMNS) <= set(columns)


class IncompleteError(Exception):
    """What a row says is not enough to run what it measured; the message says what is missing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRow:
    """A row of the table, as it is written.

    Attributes:
        values: by column.
    """

    values: Mapping[str, str]

    def __getitem__(self, column: str) -> str:
        return self.values[column].strip()

    @property
    def ran_out(self) -> bool:
        """Whether the run died of an out-of-memory error."""
        return self["measured_gib"].upper() == "OOM"

    @property
    def measured_bytes(self) -> int | None:
        """What was measured; None where the run ran out of memory."""
        return None if self.ran_out else round(float(self["measured_gib"]) * GIB)

    @property
    def metric(self) -> str:
        """Which of PyTorch's counters was read."""
        return self["meaning"].split()[0]

    @property
    def world_size(self) -> int:
        return int(self["world_size"] or 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """Where in two simulated windows the figure is read.

    Attributes:
        window: 0 for a process's first step, 1 for one that has all its states.
        phases: of that window, in which the peak is taken; empty for all.
        at_end: read what is held when the last of the phases ends, instead of the peak.
        from_start: the peak since the process began, up to the end of the phases.
        empties_cache: the script released the allocator's cache before that window.
        allocator: `PYTORCH_CUDA_ALLOC_CONF` of the run.
    """

    window: int = 1
    phases: tuple[str, ...] = ()
    at_end: bool = False
    from_start: bool = False
    empties_cache: bool = False
    allocator: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A step that can be run.

    Attributes:
        builder: a name in `workloads.BUILDERS`.
        options: what the builder takes.
        gpu: a name of the catalogue.
        reading: where the figure is read.
        transformers: the release whose modelling code ran, such as "4.46"; empty for none.
        assumptions: what the row does not say, in words.
    """

    builder: str
    options: Mapping[str, Any]
    gpu: str
    micro_batch: int
    world_size: int = 1
    reading: Reading = field(default_factory=Reading)
    transformers: str = ""
    assumptions: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """A name that two rows share if what runs and what is read is the same."""
        told = {name: value for name, value in asdict(self).items() if name != "assumptions"}
        text = json.dumps(told, sort_keys=True)
        return f"{self.builder} {hashlib.sha256(text.encode()).hexdigest()[:16]}"

    def as_record(self) -> dict[str, Any]:
        """Return it as JSON."""
        return asdict(self)

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> Step:
        """Make it from JSON."""
        reading = dict(record["reading"])
        reading["phases"] = tuple(reading["phases"])
        return cls(**{**record, "reading": Reading(**reading), "assumptions": ()})


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A row, and the step that it measured; or why that is not known."""

    row: StepRow
    step: Step | None = None
    cause: str = ""


_CARDS = {
    "h100": "h100-80gb",
    "a100": "a100-80gb",
    "unknown 80 gb": "a100-80gb",
    "sm_90 class": "h100-80gb",
    "rtx-2060-8gb": "t4",
    "rtx-3080ti-16gb": "rtx-3090",
}
"""Cards by other names; those that the catalogue lacks by one of its capability or a near one."""


def card_of(row: StepRow, catalogue: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    """Return the card's name in the catalogue, and what was assumed of it."""
    said = row["gpu"].lower()
    if said in catalogue:
        return said, ()
    name = _CARDS.get(said, "a100-80gb")
    if said in ("h100", "a100"):
        return name, ()
    return name, (f"card {row['gpu']!r} taken for {name}",)
