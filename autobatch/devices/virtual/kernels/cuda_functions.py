"""PyTorch functions that CUDA runs as one kernel of its own, and other devices in many steps.

They are replaced where they are looked up (not by a function mode, which does not see calls from
inside PyTorch's own Python functions or from the autograd thread).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from autobatch.devices.virtual.kernels import rnn
from autobatch.devices.virtual.kernels.attention import attend
from autobatch.support.patching import patched
from autobatch.support.torch_private import VF, FakeTensor

__all__ = ["cuda_kernels"]


@contextlib.contextmanager
def cuda_kernels(device: torch.device, capability: tuple[int, int]) -> Iterator[None]:
    """Run attention, recurrent layers, packing and CTC on `device` as CUDA does."""

    def on_device(original: Callable[..., Any], substitute: Callable[..., Any]) -> Any:
        def choose(first: Any, *args: Any, **kwargs: Any) -> Any:
            ours = isinstance(first, FakeTensor) and first.fake_device == device
            return (substitute if ours else original)(first, *args, **kwargs)

        return choose

    def attention(*args: Any, **kwargs: Any) -> Any:
        return attend(capability, *args, **kwargs)

    layers = {name: on_device(getattr(VF, name), rnn.layer(name)) for name in rnn.LAYERS}
    packing = {
        "_pack_padded_sequence": on_device(VF._pack_padded_sequence, rnn.pack),
        "_pad_packed_sequence": on_device(VF._pad_packed_sequence, rnn.pad),
    }
    sdpa = on_device(F.scaled_dot_product_attention, attention)
    with (
        patched(F, scaled_dot_product_attention=sdpa),
        patched(torch, ctc_loss=on_device(torch.ctc_loss, _ctc_loss)),
        patched(VF, **layers, **packing),
    ):
        yield


def _ctc_loss(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Any,
    target_lengths: Any,
    blank: int = 0,
    reduction: int = 1,
    zero_infinity: bool = False,
) -> Tensor:
    """Run CTC as if every sequence had full length: the upper bound."""
    steps, samples = log_probs.shape[:2]
    longest = targets.shape[1] if targets.dim() == 2 else targets.numel() // max(samples, 1)
    losses: Tensor = torch.ops.aten._ctc_loss.default(
        log_probs, targets, [steps] * samples, [longest] * samples, blank, zero_infinity
    )[0]
    if reduction == 0:
        return losses
    return losses.mean() if reduction == 1 else losses.sum()
