"""The runs of torchtitan: Llamas under FSDP2, eager."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import torch
from torch import nn

from autobatch.gpus.catalogue import CATALOGUE
from autobatch.workload.workload import Workload
from reports.accuracy.steps.configuration import IncompleteError, Step, StepRow, card_of
from reports.accuracy.steps.published import CONFIGS, published
from reports.common import llama


def titan_step(row: StepRow) -> Step:
    """Return the step of a row of torchtitan.

    Raises:
        IncompleteError: the model, precision, sharding or checkpointing is not simulated.
    """
    name = published(row["model"])
    if name is None or not name.startswith("llama"):
        raise IncompleteError(f"the published shapes of {row['model']} are not in this report")
    if row["sharding"] not in ("fsdp2", "none"):
        raise IncompleteError(f"sharding {row['sharding']!r}: its plan is not in this report")
    if row["precision"] not in ("bf16", "bf16 mixed"):
        raise IncompleteError(f"precision {row['precision']!r}: its kernels are not simulated")
    if row["optimizer"] not in llama.OPTIMIZERS:
        raise IncompleteError(f"optimizer {row['optimizer']!r}")
    for column in ("batch_per_gpu", "seq_or_image"):
        if not row[column].isdigit():
            raise IncompleteError(f"{column} is given as {row[column]!r}")
    gpu, assumed = card_of(row, CATALOGUE)
    policy, every = _checkpointing(row)
    options = {
        "model": name,
        "length": int(row["seq_or_image"]),
        "policy": policy,
        "every": every,
        "optimizer": row["optimizer"],
        "sharded": row["sharding"] == "fsdp2",
    }
    return Step(
        builder="titan",
        options=options,
        gpu=gpu,
        micro_batch=int(row["batch_per_gpu"]),
        world_size=row.world_size,
        assumptions=(*assumed, "fp32 master weights, bf16 to compute, fp32 to reduce gradients"),
    )


def _checkpointing(row: StepRow) -> tuple[str, int]:
    told = row["checkpointing"].lower()
    if told in ("none", "off", ""):
        return "none", 1
    if told == "full":
        return "full", 1
    layers = re.search(r"every (\d+)(?:nd|rd|th)? layer", told)
    if layers:
        return "full", int(layers[1])
    if re.search(r"\bops?\b", told):
        return "op", 1
    raise IncompleteError(f"checkpointing {row['checkpointing']!r}")


def titan_workload(step: Step) -> Workload:
    """Build what torchtitan ran: gradients clipped at norm 1."""
    told = step.options
    shapes = CONFIGS[told["model"]][2]
    with torch.device("meta"):
        model = llama.Llama(shapes, told["length"], told["policy"], told["every"])

    def batch(n: int) -> Any:
        return tuple(torch.randint(1, 1000, (n, told["length"])) for _ in range(2))

    return Workload(
        model=model,
        batch=batch,
        optimizer=llama.OPTIMIZERS[told["optimizer"]],
        window=partial(_window),
        world_size=step.world_size,
        sharding=llama.sharded if told["sharded"] else None,
    )


def _window(model: nn.Module, optimizer: Any, batches: Any) -> None:
    for tokens, targets in batches:
        optimizer.zero_grad()
        logits = model(tokens)
        loss = llama.loss_of(logits, targets)
        del logits
        loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
    optimizer.step()
