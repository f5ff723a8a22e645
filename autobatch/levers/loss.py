"""Losses that keep less: cross entropy over a vocabulary, by chunks of the positions."""

from __future__ import annotations

from functools import partial

from autobatch.levers.code import ModelCode
from autobatch.levers.lever import Lever, Option
from autobatch.levers.losses import is_chunkable
from autobatch.levers.setup import Setup

__all__ = ["LOSS"]

_CHUNKS = 8


def _options(setup: Setup) -> list[Option]:
    workload = setup.workload
    if workload.loss is not None or workload.window is not None or setup.has("loss"):
        return []  # a loss of the user's may read the logits
    if not is_chunkable(setup.model):
        return []
    code = f"from autobatch.levers.losses import chunk_loss\nchunk_loss(model, chunks={_CHUNKS})"
    return [
        Option(
            lever="loss",
            value=f"{_CHUNKS} chunks",
            what="Makes the logits of an eighth of the positions at a time, and once more in the "
            "backward pass, so that they are never in memory as a whole.",
            code=code,
            keeps_state=True,
            apply=partial(Setup.changed, change=ModelCode("loss", code)),
        )
    ]


LOSS = Lever(
    name="loss",
    what="Compute the loss of a language model without whole logits.",
    options=_options,
)
