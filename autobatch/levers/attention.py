"""Which kernel computes attention."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from autobatch.levers.code import ModelCode
from autobatch.levers.lever import Lever, Option
from autobatch.levers.setup import Setup

__all__ = ["ATTENTION"]

_SDPA = 'model.set_attn_implementation("sdpa")'


def _options(setup: Setup) -> list[Option]:
    if not _is_eager(setup.model) or setup.has("attention"):
        return []
    return [
        Option(
            lever="attention",
            value="sdpa",
            what="Attention runs in PyTorch's fused kernels, which keep no matrix of all pairs of "
            "positions.",
            code=_SDPA,
            keeps_state=True,
            apply=partial(Setup.changed, change=ModelCode("attention", _SDPA)),
        )
    ]


def _is_eager(model: nn.Module) -> bool:
    """Whether a model of Transformers computes attention op by op, and could do otherwise."""
    config: Any = getattr(model, "config", None)
    return (
        getattr(config, "_attn_implementation", None) == "eager"
        and hasattr(model, "set_attn_implementation")
        and bool(getattr(model, "_supports_sdpa", False))
    )


ATTENTION = Lever(
    name="attention",
    what="Compute attention in fused kernels.",
    options=_options,
)
