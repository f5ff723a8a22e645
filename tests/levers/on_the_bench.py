"""A training run with levers on the card of the bench: what it allocates and reserves.

The loop is written by hand, and the code of the levers is run over the model as a user would.
"""

from __future__ import annotations

import sys

import torch

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


if __name__ == "__main__":
    tell(peaks(sys.argv[1], sys.argv[2]))
