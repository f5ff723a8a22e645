"""Which kernel computes attention."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend

from autobatch.levers.code import ModelCode
from autobatch.levers.lever import Lever, Option
from autobatch.levers.setup import Setup

__all__ = ["ATTENTION", "ATTENTION_KERNEL", "runs_fused_attention"]

_SDPA = 'model.set_attn_implementation("sdpa")'

_FLASH = SDPBackend.FLASH_ATTENTION
_KERNELS = {
    "flash": _FLASH,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}

_FUSED_IN_HALVES = (8, 0)
"""The compute capability from which on there is a choice: flash and cuDNN's kernels take halves."""

_CODE = """\
from torch.nn.attention import SDPBackend, sdpa_kernel
kernels = [{kernels}]
with sdpa_kernel(kernels, set_priority=True):  # around the loop, or around trainer.train()"""


def runs_fused_attention(model: nn.Module) -> bool:
    """Return whether a model runs PyTorch's fused attention, as far as its modules tell.

    >>> runs_fused_attention(nn.TransformerEncoderLayer(8, 2))
    True
    """
    config: Any = getattr(model, "config", None)
    if hasattr(config, "_attn_implementation"):
        return bool(config._attn_implementation == "sdpa")
    return any(
        isinstance(module, nn.MultiheadAttention) or getattr(module, "fused_attn", False) is True
        for module in model.modules()
    )


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


def _kernels(setup: Setup) -> list[Option]:
    if setup.kernels or not (
        setup.gpu.compute_capability >= _FUSED_IN_HALVES
        and runs_fused_attention(setup.model)
        and _computes_in_halves(setup)
    ):
        return []
    # PyTorch's own first choice: cuDNN's on Hopper's and Blackwell's data centre cards
    usual = "cudnn" if setup.gpu.compute_capability[0] in (9, 10) else "flash"
    return [_first(value) for value in _KERNELS if value != usual]


def _first(value: str) -> Option:
    """Return the option of asking for a kernel first, and for the others where it cannot."""
    first = _KERNELS[value]
    others = (kernel for kernel in (*_KERNELS.values(), SDPBackend.MATH) if kernel != first)
    kernels = (first, *others)
    return Option(
        lever="attention-kernel",
        value=value,
        what=f"Attention runs in the {value} kernel where it can, before the others.",
        code=_CODE.format(kernels=", ".join(f"SDPBackend.{kernel.name}" for kernel in kernels)),
        keeps_state=True,
        apply=partial(replace, kernels=kernels),
    )


def _computes_in_halves(setup: Setup) -> bool:
    halves = (torch.float16, torch.bfloat16)
    return setup.workload.autocast is not None or any(
        parameter.dtype in halves for parameter in setup.model.parameters()
    )


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

ATTENTION_KERNEL = Lever(
    name="attention-kernel",
    what="Compute attention in another one of PyTorch's fused kernels.",
    options=_kernels,
)
