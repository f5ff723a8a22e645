"""What every case of `tests.bench.operators` allocates in a training step, in order."""

from __future__ import annotations

import torch

from autobatch.devices.cuda.memory_history import HistoryRecorder
from autobatch.devices.cuda.runtime import CudaRuntime
from tests.bench.operators import CASES, Case, loss_of
from tests.bench.programs import tell


def allocated(case: Case, samples: int) -> list[int]:
    """Return the bytes of each allocation of a forward and a backward pass."""
    model = case.build().cuda()
    batch = torch.zeros(samples, *case.shape, device="cuda")
    loss_of(model, batch).backward()  # libraries keep what they take at first
    model.zero_grad()
    recorder = HistoryRecorder(CudaRuntime(0))
    with recorder.recording():
        recorder.begin("forward", 0, 0)
        loss = loss_of(model, batch) / 1  # as a window divides by its number of micro-batches
        recorder.begin("backward", 0, 0)
        loss.backward()
        recorder.begin("step", 0, 0)
        torch.cuda.synchronize()
    return [b.size_bytes for b in recorder.trace(samples, 1).blocks if b.phase != "setup"]


def main() -> None:
    tell({name: allocated(case, 2) for name, case in CASES.items()})


if __name__ == "__main__":
    main()
