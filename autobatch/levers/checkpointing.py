"""Activation checkpointing: blocks recompute in the backward pass what they do not keep."""

from __future__ import annotations

from functools import partial

from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)

from autobatch.levers.lever import Lever, Option
from autobatch.levers.setup import Setup
from autobatch.workload.blocks import repeated_blocks

__all__ = ["CHECKPOINTING"]


def _options(setup: Setup) -> list[Option]:
    blocks = repeated_blocks(setup.workload.model)
    if not blocks:
        return []
    names = " | ".join(sorted({type(block).__name__ for block in blocks}))
    return [
        Option(
            lever="checkpointing",
            value="every block",
            what=f"Each of the {len(blocks)} blocks keeps its input alone and is run once more in "
            "the backward pass.",
            code=_CODE.format(names=names),
            trainer="gradient_checkpointing=True",
            apply=lambda setup: setup.changed(partial(_checkpointed, stride=1)),
        )
    ]


_CODE = """\
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing)
apply_activation_checkpointing(model, check_fn=lambda m: type(m).__name__ in "{names}")"""


def _checkpointed(model: nn.Module, *, stride: int) -> None:
    blocks = repeated_blocks(model)
    chosen = set(map(id, blocks[::stride]))
    apply_activation_checkpointing(model, check_fn=lambda module: id(module) in chosen)


CHECKPOINTING = Lever(
    name="checkpointing",
    what="Recompute activations in the backward pass instead of keeping them.",
    options=_options,
)
