"""Run one row, and print both traces around every difference."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Sequence

from autobatch.devices.virtual.gpu import VirtualGpu
from autobatch.gpus.catalogue import find_gpu
from reports.fidelity.differences import sequence
from reports.fidelity.rows import Row
from reports.fidelity.subjects import NotBuiltError, workload
from reports.fidelity.worker import Bench

_KEY = re.compile(
    r"(?P<model>\S+) (?P<micro>\d+) x (?P<steps>\d+) (?P<precision>fp32|bf16)"
    r"(?P<checkpointed> checkpointed)? (?P<gpu>\S+)"
)


def main(arguments: Sequence[str]) -> int:
    """Run the command; return the exit code."""
    found = _KEY.fullmatch(" ".join(arguments))
    if found is None:
        print(f"not a row: {' '.join(arguments)!r}", file=sys.stderr)
        return 2
    row = Row(
        model=found["model"],
        gpu=found["gpu"],
        micro_batch=int(found["micro"]),
        precision=found["precision"],
        checkpointing=found["checkpointed"] is not None,
        accumulation_steps=int(found["steps"]),
    )
    try:
        what = workload(
            row.model, device="meta", checkpointing=row.checkpointing, autocast=row.autocast
        )
    except NotBuiltError as error:
        print(f"{row.model}: {error}", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, "truth")
        bench = Bench(row.gpu)
        bench.ask(row, file)
        run = VirtualGpu(find_gpu(row.gpu)).run(
            what, micro_batch=row.micro_batch, accumulation_steps=row.accumulation_steps
        )
        truth = bench.answer(file)
    if isinstance(truth, str):
        print(truth, file=sys.stderr)
        return 1
    print("\n".join(sequence(truth.trace, run.trace)))
    for name, ours, theirs in (
        ("allocated", truth.allocated_bytes, run.replay.peak_allocated_bytes),
        ("reserved", truth.reserved_bytes, run.replay.peak_reserved_bytes),
    ):
        print(f"{name}: bench {ours:,} B, predicted {theirs:,} B")
    return 0
