"""Record, on the GPU of this machine, what contexts, kernels and convolutions take beside tensors.

    python -m reports.hardware.convolutions [--seconds 120] [--folder FOLDER]

Contexts are read first, in a process that has the card for itself. Two more processes then record
kernels and convolutions at the same time, the most telling first, until the time is over. The file
is FOLDER/<gpu>-torch<version>-convolutions.json, written anew every ten seconds. Exit code 0: every
part has rows; 1: a part has none.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timezone
from itertools import product
from pathlib import Path
from typing import Any

import torch

from autobatch.devices.cuda.runtime import CudaRuntime
from autobatch.gpus import nvml
from reports.common.journal import append, read_journal
from reports.common.results import one_line, versions
from reports.hardware.bench import Bench, PeakWatch, file_stem, looks_at_card
from reports.hardware.contexts import contexts
from reports.hardware.convolution_layers import COMMON, RARE, SPECIAL, Layer
from reports.hardware.kernels import DTYPES, LIMIT_BYTES, Facts, Play, Row, kernels, record

FOLDER = Path(__file__).parent
CHILD = (sys.executable, "-m", "reports.hardware.convolutions", "child")
PARTS = ("contexts", "kernels", "convolutions")
_CONTEXTS_SECONDS = 45.0
_SAVE_SECONDS = 10.0
_ENDING_SECONDS = 6.0
"""What is left for the last group of rows to be read."""


# The grid


_HALVES = ("bf16", "fp16")


def grid() -> Iterator[Row]:
    """Yield the rows, the most telling first; "tf32" is fp32 as PyTorch has it by default."""
    seen: set[str] = set()
    for row in _parts():
        words = json.dumps(row.facts)
        if words not in seen:
            seen.add(words)
            yield row


def _parts() -> Iterator[Row]:
    for part in (
        product(COMMON, (32, 2), ("tf32", "bf16"), (False, True)),
        product(SPECIAL, (2,), ("tf32", "bf16"), (False, True)),
        product(COMMON, (32, 2), ("fp16",), (False, True)),
        product(SPECIAL, (32,), ("tf32", "bf16"), (False, True)),
        product(COMMON, (8, 128, 1), ("tf32", "bf16"), (False, True)),
        product(COMMON, (32,), ("fp32",), (False, True)),
        product(RARE, (2,), ("tf32", "bf16"), (False, True)),
    ):
        yield from _rows(part)
    yield from _rows(product(COMMON[:8], (32,), ("tf32", "bf16"), (False, True)), benchmark=True)
    yield from _rows(product(SPECIAL, (8, 1, 2), ("tf32", *_HALVES), (False, True)))
    yield from _rows(product(COMMON, (2, 8, 1, 128), ("fp32", "fp16"), (False, True)))
    yield from _rows(product(RARE, (32, 8), ("tf32", *_HALVES, "fp32"), (False, True)))


def _rows(part: Iterator[tuple[Layer, int, str, bool]], benchmark: bool = False) -> Iterator[Row]:
    for layer, batch, dtype, channels_last in part:
        row = convolution(layer, batch, dtype, channels_last, benchmark)
        if row is not None:
            yield row


def convolution(
    layer: Layer, batch: int, dtype: str, channels_last: bool = False, benchmark: bool = False
) -> Row | None:
    """Return the row of a layer; None if it is too large, or has no such format."""
    kind = DTYPES.get(dtype, torch.float32)  # "tf32" is fp32 with rounded products
    shapes = layer.shapes(batch)
    dimensions = len(layer.kernel)
    elements = [torch.Size(shape).numel() for shape in shapes]
    if 3 * sum(elements) * kind.itemsize > LIMIT_BYTES or (channels_last and dimensions == 1):
        return None
    formats = {2: torch.channels_last, 3: torch.channels_last_3d}
    layout = formats[dimensions] if channels_last else torch.contiguous_format
    how: tuple[Any, ...] = (
        [layer.stride] * dimensions,
        [layer.padding] * dimensions,
        [layer.dilation] * dimensions,
        layer.transposed,
        [0] * dimensions,
        layer.groups,
    )

    def run(play: Play, device: torch.device) -> None:
        cudnn: Any = torch.backends.cudnn
        cudnn.allow_tf32, cudnn.benchmark = dtype == "tf32", benchmark
        x, w = (
            torch.empty(shape, device=device, dtype=kind, memory_format=layout).fill_(0.5)
            for shape in shapes[:2]
        )
        aten = torch.ops.aten
        out = play("forward", lambda: aten.convolution(x, w, None, *how))
        gradient = torch.ones_like(out)
        del out
        for name, mask in (
            ("data_gradient", [True, False, False]),
            ("weight_gradient", [False, True, False]),
            ("both", [True, True, False]),
        ):
            play(
                name,
                lambda mask=mask: aten.convolution_backward(gradient, x, w, None, *how, mask),
            )

    facts = {
        "layer": layer.name,
        "batch": batch,
        "dtype": dtype,
        "format": "channels_last" if channels_last else "contiguous",
        "input": list(shapes[0]),
        "weight": list(shapes[1]),
        "output": list(shapes[2]),
        "stride": layer.stride,
        "padding": layer.padding,
        "dilation": layer.dilation,
        "groups": layer.groups,
        "transposed": layer.transposed,
        "benchmark": benchmark,
    }
    return Row(facts, run)


# One part, in a process of its own


def opened() -> tuple[Bench, Callable[[], int | None]]:
    """Open the current CUDA device; also return what asks the driver for the card's used bytes."""
    ask = looks_at_card()

    def look() -> int | None:
        used = ask()
        if used is None:  # without NVML, CUDA knows
            free, total = torch.cuda.mem_get_info()
            used = total - free
        return used

    return Bench(card=CudaRuntime(), watch=PeakWatch(lambda: None)), look


def child(
    part: str,
    path: Path,
    *,
    open_card: Callable[[], tuple[Bench, Callable[[], int | None]]] = opened,
) -> int:
    """Record one part in a journal, once a line on stdin says in how many seconds."""
    warnings.simplefilter("ignore")
    line = sys.stdin.readline()
    if not line:
        return 1  # the parent is gone
    deadline = time.monotonic() + float(line)
    numbers = iter(range(10**9))

    def keep(facts: Facts) -> None:
        append(path, {"key": next(numbers), **facts})

    try:
        gpus = nvml.installed_gpus()
        before_bytes = gpus[0].used_bytes if len(gpus) == 1 else None
        bench, look = open_card()
        card = bench.card
        if part == "contexts":
            contexts(card.device, look, lambda: card.stats().reserved_bytes, keep, before_bytes)
            keep({"device": bench.facts()})
        else:
            keep({"device": bench.facts()})
            record(kernels() if part == "kernels" else grid(), card, keep, deadline)
        keep({"finished": True})
    except Exception as error:
        keep({"error": one_line(error)})
        return 1
    finally:
        sys.stdout.flush()
    return 0


# All parts


def measure_all(command: Sequence[str], folder: Path, seconds: float, words: str) -> Path:
    """Run every part, and return the file."""
    started = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="autobatch-convolutions-") as scratch:
        journals = {part: Path(scratch) / f"{part}.jsonl" for part in PARTS}
        logs = {part: Path(scratch) / f"{part}.log" for part in PARTS}
        children = {part: _start(command, part, journals[part], logs[part]) for part in PARTS}
        path = folder / "unknown-convolutions.json"

        def save() -> None:
            nonlocal path
            found = {part: list(read_journal(journals[part]).values()) for part in PARTS}
            codes = {part: children[part].poll() for part in PARTS}
            says = {p: logs[p].read_text(errors="replace")[-2000:] for p in PARTS if codes[p]}
            document = _document(found, words) | {
                "seconds": time.monotonic() - started,
                "exit_codes": codes,
                "stderr": says,
            }
            if document["device"] is not None and path.name.startswith("unknown"):
                path.unlink(missing_ok=True)
                path = folder / f"{file_stem(document['device'])}-convolutions.json"
            partial = path.with_suffix(".part")
            partial.write_text(_text(document))
            partial.replace(path)

        def await_parts(parts: Sequence[str], until: float) -> None:
            for part in parts:
                _go(children[part], until - time.monotonic() - _ENDING_SECONDS)
            saved = time.monotonic()
            while time.monotonic() < until and any(children[p].poll() is None for p in parts):
                time.sleep(0.1)
                if time.monotonic() - saved > _SAVE_SECONDS:
                    save()
                    saved = time.monotonic()
            for part in parts:
                _stop(children[part])
            save()

        try:
            end = started + seconds
            await_parts(PARTS[:1], min(end, started + _CONTEXTS_SECONDS))
            await_parts(PARTS[1:], end)
        finally:
            for process in children.values():
                _stop(process)
    return path


def _start(command: Sequence[str], part: str, journal: Path, log: Path) -> subprocess.Popen[str]:
    with log.open("w") as stream:
        return subprocess.Popen(
            [*command, part, str(journal)],
            stdin=subprocess.PIPE,
            stdout=stream,
            stderr=stream,
            text=True,
        )


def _go(process: subprocess.Popen[str], seconds: float) -> None:
    """Let a child begin; one that has ended says why in its log."""
    assert process.stdin is not None
    with contextlib.suppress(OSError), process.stdin as stream:
        stream.write(f"{max(seconds, 1.0)}\n")


def _stop(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    if process.stdin is not None:
        with contextlib.suppress(OSError):
            process.stdin.close()


def _document(found: dict[str, list[Facts]], words: str) -> Facts:
    devices = [row["device"] for rows in found.values() for row in rows if "device" in row]
    rows = {
        part: [
            {name: value for name, value in row.items() if name != "key"}
            for row in rows
            if "device" not in row and "finished" not in row
        ]
        for part, rows in found.items()
    }
    return {
        "schema": 1,
        "evidence": "measured",
        "command": words,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": devices[0] if devices else None,
        "versions": versions("torch", "numpy", "triton", "nvidia-ml-py"),
        "environment": {name: os.environ[name] for name in sorted(os.environ) if _matters(name)},
        "finished": [part for part in PARTS if any("finished" in row for row in found[part])],
        **rows,
    }


def _matters(name: str) -> bool:
    return name in ("CUDA_MODULE_LOADING", "CUDA_VISIBLE_DEVICES") or name.startswith(
        ("CUBLAS", "CUDNN", "TORCH_CUDNN", "NVIDIA_TF32", "PYTORCH_")
    )


def _text(document: Facts) -> str:
    """Return JSON with one line for each row."""
    parts = []
    for name, value in document.items():
        if name in PARTS:
            lines = ",\n".join(f"  {json.dumps(row)}" for row in value)
            parts.append(f" {json.dumps(name)}: [\n{lines}\n ]")
        else:
            parts.append(f" {json.dumps(name)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["child"]:
        return child(words[1], Path(words[2]))
    parser = argparse.ArgumentParser(
        prog="python -m reports.hardware.convolutions",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seconds", type=float, default=120, metavar="S", help="for everything")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the file goes")
    options = parser.parse_args(words)
    command = " ".join(["python -m reports.hardware.convolutions", *words])
    path = measure_all(CHILD, options.folder, options.seconds, command)
    document = json.loads(path.read_text())
    counts = {part: sum("error" not in r or len(r) > 1 for r in document[part]) for part in PARTS}
    print(path, counts, document["exit_codes"], flush=True)
    return 0 if all(counts.values()) and document["device"] else 1


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # a library that hangs at its end must not hold the card
