"""A process that compares rows: tasks as lines of JSON on stdin, records on stdout.

It predicts, while a process on the bench trains; both build the model from its name.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import IO

from autobatch.devices.base import Run
from autobatch.devices.virtual.gpu import VirtualGpu
from autobatch.devices.virtual.kernels import convolutions
from autobatch.gpus.catalogue import find_gpu
from autobatch.support.patching import patched
from reports.common.journal import Record
from reports.common.results import one_line
from reports.common.worker import answers_alone, say
from reports.fidelity.differences import difference
from reports.fidelity.rows import Row
from reports.fidelity.subjects import NotBuiltError, workload
from reports.fidelity.training import Truth
from tests.bench.card import environment

_CAPACITY = "76GiB"
"""Of every card, so that no row runs out of memory; sizes do not depend on it."""

_COPIED_BYTES = 2**22
"""Of a copy that is really made; more would fill the machine's memory with weights."""


def main() -> int:
    """Compare rows until stdin ends; return the exit code."""
    answers = answers_alone()
    benches: dict[str, Bench] = {}
    say(answers, ready=True)
    for line in sys.stdin:
        task = json.loads(line)
        row = Row.of(task)
        if row.gpu not in benches:
            benches[row.gpu] = Bench(row.gpu)
        say(answers, **compared(row, benches[row.gpu]))
        say(answers, done=True)
    return 0


class Bench:
    """A process on a simulated card that answers rows."""

    def __init__(self, gpu: str) -> None:
        """Start it; it imports its libraries while the first prediction runs."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "reports.fidelity.on_the_bench"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment(gpu=gpu, capacity=_CAPACITY, copy_limit=_COPIED_BYTES)
            | {"CUDA_VISIBLE_DEVICES": "0"},  # workers are told that there is none
        )

    def ask(self, row: Row, file: str, reserve_bytes: int = 0) -> None:
        """Hand it a row; `reserve_bytes` is what cuDNN's recurrent layers are to keep."""
        task = {**row.task(), "file": file, "reserve_bytes": reserve_bytes}
        _stream(self._process.stdin).write(json.dumps(task).encode() + b"\n")
        _stream(self._process.stdin).flush()

    def answer(self, file: str) -> Truth | str:
        """Wait for a row; return its truth, or why there is none."""
        line = _stream(self._process.stdout).readline()
        content = Path(file).read_bytes()
        if not content:
            return f"the process died: {line.decode().strip()}"
        found: Truth | str = pickle.loads(content)  # of our own child
        return found


def _stream(pipe: IO[bytes] | None) -> IO[bytes]:
    assert pipe is not None
    return pipe


def compared(row: Row, bench: Bench) -> Record:
    """Return the record of a row."""
    record: Record = {"key": row.key, **{k: v for k, v in row.task().items() if k != "keys"}}
    handle, file = tempfile.mkstemp(prefix="fidelity-")
    os.close(handle)
    is_recurrent = row.model.startswith("recurrent:")
    try:
        if not is_recurrent:
            bench.ask(row, file)
        predicted = _predicted(row)
        if is_recurrent:
            bench.ask(row, file, 0 if isinstance(predicted, str) else _reserve(predicted))
        truth = bench.answer(file)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(file)
    if isinstance(predicted, str) or isinstance(truth, str):
        reasons = {"predicted": predicted, "bench": truth}
        texts = {side: text for side, text in reasons.items() if isinstance(text, str)}
        is_skipped = any(NotBuiltError.__name__ in text for text in texts.values())
        return {**record, "outcome": "skipped" if is_skipped else "failed", "reasons": texts}
    replay = predicted.replay
    return {
        **record,
        "outcome": "compared",
        "bench_bytes": [truth.allocated_bytes, truth.reserved_bytes],
        "predicted_bytes": [replay.peak_allocated_bytes, replay.peak_reserved_bytes],
        "difference": difference(truth.trace, predicted.trace),
        "values_read": dict(truth.values_read),
    }


def _predicted(row: Row) -> Run | str:
    try:
        what = workload(
            row.model, device="meta", checkpointing=row.checkpointing, autocast=row.autocast
        )
        with patched(convolutions, cudnn_bytes=lambda *_: 0):  # the bench does not know them
            return VirtualGpu(find_gpu(row.gpu)).run(
                what, micro_batch=row.micro_batch, accumulation_steps=row.accumulation_steps
            )
    except Exception as error:
        return one_line(error)


def _reserve(run: Run) -> int:
    """Return what a recurrent layer is predicted to keep, which the bench cannot know."""
    return max(
        (
            block.size_bytes
            for block in run.trace.blocks
            if block.op.startswith("aten::_cudnn_rnn") and block.phase == "forward"
        ),
        default=0,
    )


if __name__ == "__main__":
    sys.exit(main())
