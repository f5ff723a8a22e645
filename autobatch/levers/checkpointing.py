"""Activation checkpointing: blocks recompute in the backward pass what they do not keep.

Blocks are those that FSDP2 would share out one by one (`workload/blocks.py`). Where a model of
Transformers can checkpoint its own blocks it is asked to, as Trainer does; others are wrapped.
"""

from __future__ import annotations

import inspect
from functools import partial

from torch import nn

from autobatch.levers.attention import runs_fused_attention
from autobatch.levers.code import ModelCode
from autobatch.levers.lever import Lever, Option
from autobatch.levers.naming import blocks_in_order, expression_of
from autobatch.levers.repeated import RunTwice, has_spectral_norm, keeps_averages
from autobatch.levers.setup import Setup
from autobatch.support.torch_private import CheckpointWrapper

__all__ = ["CHECKPOINTING"]

_STRIDES = {1: "every block", 2: "every 2nd block", 3: "every 3rd block", 4: "every 4th block"}
_FEWEST = 2
"""Blocks that have to be left to be checkpointed."""

_ATTENTION = (
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
)
_PRODUCTS = (*_ATTENTION, "mm", "addmm", "bmm", "baddbmm", "convolution")
"""Ops with most FLOPs for a byte that they return: hundreds, where others have a few."""

_SELECTIONS = {
    "selective": (
        _PRODUCTS,
        "keep the results of matrix products, convolutions and attention, and recompute what is "
        "cheap: normalizations, activations and dropout",
    ),
    "selective, attention": (
        _ATTENTION,
        "keep the results of attention, whose FLOPs grow with the square of the length, and "
        "recompute all else",
    ),
}


def _options(setup: Setup) -> list[Option]:
    model = setup.model
    blocks = _recomputed(model)
    if not blocks or setup.has("checkpointing") or _is_checkpointed(model):
        return []
    kept = _Blocks(model, blocks)
    options = [
        kept.every(stride)
        for stride in _STRIDES
        if stride == 1 or -(-len(blocks) // stride) >= _FEWEST
    ]
    return options + [
        kept.selective(value)
        for value, (ops, _) in _SELECTIONS.items()
        if ops is not _ATTENTION or runs_fused_attention(model)
    ]


def _recomputed(model: nn.Module) -> dict[str, nn.Module]:
    """Return the blocks of a model by name, but for those that come before all that is trained.

    Nothing of these waits for the backward pass, so that they run once.
    """
    blocks = blocks_in_order(model)
    before = set()
    for name, module in model.named_modules():
        if any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
            break
        before.add(name)
    frozen = [name for name in blocks if name in before and not _is_trained(blocks[name])]
    return {name: block for name, block in blocks.items() if name not in frozen}


def _is_trained(block: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in block.parameters())


class _Blocks:
    """The blocks of a model, and the code that checkpoints them."""

    def __init__(self, model: nn.Module, blocks: dict[str, nn.Module]) -> None:
        self._model = model
        self._blocks = blocks
        self._names = expression_of(model, blocks)
        self._own = _own_method(model, blocks)

    def every(self, stride: int) -> Option:
        """Return the option that checkpoints every nth block."""
        count = -(-len(self._blocks) // stride)
        how = '{"use_reentrant": False}'
        trainer = None
        if self._own is None:
            code = self._wrapping(stride)
        else:
            method, counts = self._own
            head = "\n".join(self._averages_kept(stride))
            code = f"{head}\nmodel.{method}({how})".strip()
            if stride > 1 and counts:
                code = f"{code[:-1]}, every_n_layers={stride})"
            elif stride > 1:
                code += (
                    f"\nblocks = {self._names}\nfor block in blocks:\n"
                    f"    block.gradient_checkpointing = block in blocks[::{stride}]"
                )
            elif not head:
                name = method.removesuffix("_enable")
                trainer = f"{name}=True, {name}_kwargs={how}"
        return self._option(
            _STRIDES[stride],
            f"{count} of {len(self._blocks)} blocks keep their inputs alone and are run once more "
            "in the backward pass.",
            code,
            trainer,
            stride,
        )

    def selective(self, value: str) -> Option:
        """Return the option whose blocks keep the results of some ops."""
        ops, what = _SELECTIONS[value]
        kept = ",\n".join(f"    torch.ops.aten.{op}.default" for op in ops)
        head = (
            "import torch\n"
            "from functools import partial\n"
            "from torch.utils.checkpoint import create_selective_checkpoint_contexts\n"
            f"kept = [\n{kept},\n]\n"
            "contexts = partial(create_selective_checkpoint_contexts, kept)\n"
        )
        if self._own is None:
            code = head + self._wrapping(1, selective=True)
        else:
            lines = [
                *self._averages_kept(),
                'how = {"use_reentrant": False, "context_fn": contexts}',
                f"model.{self._own[0]}(how)",
            ]
            code = head + "\n".join(lines)
        return self._option(value, f"The {len(self._blocks)} blocks {what}.", code, None)

    def _wrapping(self, stride: int, *, selective: bool = False) -> str:
        """Return the code that wraps every nth block."""
        wrapper = (
            "    checkpoint_wrapper_fn=partial(checkpoint_wrapper, context_fn=contexts),\n"
            if selective
            else ""
        )
        names = "apply_activation_checkpointing" + (", checkpoint_wrapper" if selective else "")
        lines = [
            "from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (",
            f"    {names})",
            *(self._averages_kept(stride) or [self._chosen_line(stride)]),
        ]
        if getattr(getattr(self._model, "config", None), "use_cache", False):
            lines.append("model.config.use_cache = False")
        lines.append(
            "apply_activation_checkpointing(\n"
            f"    model,\n{wrapper}    check_fn=lambda module: module in blocks)"
        )
        return "\n".join(lines)

    def _chosen(self, stride: int) -> dict[str, nn.Module]:
        """Return every nth block by name."""
        return {name: self._blocks[name] for name in list(self._blocks)[::stride]}

    def _chosen_line(self, stride: int) -> str:
        return f"blocks = {self._names}" + (f"[::{stride}]" if stride > 1 else "")

    def _averages_kept(self, stride: int = 1) -> list[str]:
        """Return lines with which averages of blocks end up where one run would put them.

        There are none where no block has any. PyTorch's own norms alone track running statistics
        under this name; a momentum of another library may be the share of what was.
        """
        if not any(map(keeps_averages, self._chosen(stride).values())):
            return []
        return [
            self._chosen_line(stride),
            "for block in blocks:  # a block that runs twice updates its averages twice",
            "    for layer in block.modules():",
            '        if getattr(layer, "track_running_stats", False) and layer.momentum:',
            "            layer.momentum = 1 - (1 - layer.momentum) ** 0.5",
        ]

    def _option(
        self, value: str, what: str, code: str, trainer: str | None, stride: int = 1
    ) -> Option:
        chosen = self._chosen(stride)
        iterates = any(map(has_spectral_norm, chosen.values()))
        if iterates:
            what += (
                " A spectral norm in them takes one more step of its power iteration each time, "
                "so that gradients are others."
            )
        return Option(
            lever="checkpointing",
            value=value,
            what=what,
            code=code,
            trainer=trainer,
            changes_numerics=iterates,
            keeps_state=True,
            apply=partial(_checkpointed, names=tuple(chosen), code=code),
        )


def _checkpointed(setup: Setup, *, names: tuple[str, ...], code: str) -> Setup:
    watched = setup.having(changes=(RunTwice(names), *setup.workload.changes))
    return watched.changed(ModelCode("checkpointing", code))


def _own_method(model: nn.Module, blocks: dict[str, nn.Module]) -> tuple[str, bool] | None:
    """Return a model's own method that checkpoints its blocks, and whether it takes every nth."""
    if not getattr(model, "supports_gradient_checkpointing", False):
        return None
    if not all(hasattr(block, "gradient_checkpointing") for block in blocks.values()):
        return None
    method = next(
        name
        for name in ("activation_checkpointing_enable", "gradient_checkpointing_enable")
        if hasattr(model, name)
    )
    return method, "every_n_layers" in inspect.signature(getattr(model, method)).parameters


def _is_checkpointed(model: nn.Module) -> bool:
    """Whether a part of a model is checkpointed already."""
    return any(
        isinstance(module, CheckpointWrapper)
        or getattr(module, "gradient_checkpointing", False) is True
        or getattr(module, "grad_checkpointing", False) is True
        for module in model.modules()
    )


CHECKPOINTING = Lever(
    name="checkpointing",
    what="Recompute activations in the backward pass instead of keeping them.",
    options=_options,
)
