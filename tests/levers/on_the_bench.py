"""Training runs with levers on the card of the bench: what each allocates and reserves.

The loop is written by hand, and the code of the levers is run over the model as a user would.
"""

from __future__ import annotations

import gc
import sys

import torch

from autobatch.devices.cuda.runtime import CudaRuntime
from autobatch.workload.workload import Workload
from tests.bench.programs import tell
from tests.levers.setups import RUNS, SAMPLES, executed, options_of, setup_of


def peaks(name: str, label: str) -> list[int]:
    workload = RUNS[name]()
    code = "" if label == "none" else options_of(setup_of(workload))[label].code
    if label.startswith("attention-kernel"):
        executed(f"{code}\n    train(workload)", train=train, workload=workload)
    else:
        train(workload, code)
    stats = torch.cuda.memory_stats()
    return [stats["allocated_bytes.all.peak"], stats["reserved_bytes.all.peak"]]


def train(workload: Workload, code: str = "") -> None:
    names = executed(code, model=workload.model)
    model = names["model"].cuda().train()
    if "optimizer" in code:  # an optimizer is made when the model is on the card
        names = executed(code, model=model)
    optimizer = names.get("optimizer") or torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad]
    )
    output = loss = None
    for _ in range(2):
        for _ in range(2):
            batch = workload.batch(SAMPLES)
            if isinstance(batch, dict):
                inputs = {key: value.cuda() for key, value in batch.items()}
                output = model(**inputs)
                loss = output.loss / 2
            else:
                inputs = batch.cuda()
                loss = workload.loss(model, inputs) / 2
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    del inputs, output, loss


def main(name: str, *labels: str) -> None:
    card, found = CudaRuntime(0), {}
    for label in labels:
        found[label] = peaks(name, label)
        gc.collect()
        card.empty_cache()
        assert not torch.cuda.memory_reserved()  # the next one begins as in a new process
        card.reset_peaks()
    tell(found)


if __name__ == "__main__":
    main(*sys.argv[1:])
