"""How images lie in memory: channels last, as tensor cores read them."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from autobatch.levers.code import BatchCode, ModelCode
from autobatch.levers.lever import Lever, Option
from autobatch.levers.setup import Setup
from autobatch.workload.tree import map_tensors

__all__ = ["MEMORY_FORMAT", "channels_last"]

_MODEL = "import torch\nmodel = model.to(memory_format=torch.channels_last)"
_BATCH = "from autobatch.levers.memory_format import channels_last\nbatch = channels_last(batch)"


def channels_last(batch: object) -> object:
    """Return a batch whose floating-point images, (N, C, H, W), have their channels last.

    >>> image = channels_last(torch.ones(2, 3, 4, 4))
    >>> image.shape, image.stride()
    (torch.Size([2, 3, 4, 4]), (48, 1, 12, 3))
    """

    def convert(tensor: Tensor) -> Tensor:
        if tensor.dim() != 4 or not tensor.is_floating_point():
            return tensor
        return tensor.to(memory_format=torch.channels_last)

    return map_tensors(convert, batch)


def _options(setup: Setup) -> list[Option]:
    weights = [
        module.weight
        for module in setup.model.modules()
        if isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1)
    ]
    # of 1 by 1 kernels, both formats are one
    if setup.has("memory-format") or not any(map(_is_contiguous, weights)):
        return []
    return [
        Option(
            lever="memory-format",
            value="channels last",
            what="The channels of a pixel lie side by side, as tensor cores read them: faster "
            "convolutions in halves.",
            code=f"{_MODEL}\n{_BATCH}",
            keeps_state=True,
            apply=_channels_last,
        )
    ]


def _is_contiguous(weight: Tensor) -> bool:
    return weight.is_contiguous() and not weight.is_contiguous(memory_format=torch.channels_last)


def _channels_last(setup: Setup) -> Setup:
    changed = setup.changed(ModelCode("memory-format", _MODEL))
    return changed.with_batches(partial(BatchCode, text=_BATCH))


MEMORY_FORMAT = Lever(
    name="memory-format",
    what="Order the elements of images as fast kernels read them.",
    options=_options,
)
