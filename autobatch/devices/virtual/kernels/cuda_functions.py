"""PyTorch functions that CUDA runs as one kernel of its own, and other devices in many steps.

They are replaced in the modules where they are looked up. A function mode could not replace them:
it does not see calls from inside PyTorch's own Python functions, or in backward passes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autobatch.devices.preserve import attention_in_asked_order
from autobatch.devices.virtual.kernels import rnn
from autobatch.devices.virtual.kernels.attention import attend
from autobatch.devices.virtual.kernels.memory_formats import layout_of
from autobatch.devices.virtual.kernels.norms import runs_on_cudnn
from autobatch.devices.virtual.recorder import StorageRecorder
from autobatch.support.patching import patched
from autobatch.support.torch_private import VF, DisableTorchFunction, FakeTensor

__all__ = ["cuda_kernels"]


@contextlib.contextmanager
def cuda_kernels(
    device: torch.device, capability: tuple[int, int], recorder: StorageRecorder
) -> Iterator[None]:
    """Run attention, recurrent layers, packing, norms, CTC and one-hot on `device` as CUDA does.

    Args:
        device: the simulated one.
        capability: its compute capability.
        recorder: told which memory weights are moved into.
    """

    def on_device(original: Callable[..., Any], ours: Callable[..., Any]) -> Any:
        def choose(*args: Any, **kwargs: Any) -> Any:
            first = args[0] if args else None
            if not isinstance(first, Tensor):  # any of them may be named: query=…, key=…
                given = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
                first = next(given, None)
            is_ours = isinstance(first, FakeTensor) and first.fake_device == device
            return (ours if is_ours else original)(*args, **kwargs)

        return choose

    layers = {name: on_device(getattr(VF, name), layer) for name, layer in rnn.LAYERS.items()}
    packing = {
        "_pack_padded_sequence": on_device(VF._pack_padded_sequence, rnn.pack),
        "_pad_packed_sequence": on_device(VF._pad_packed_sequence, rnn.pad),
    }
    flatten = nn.RNNBase.flatten_parameters

    def flatten_parameters(layer: nn.RNNBase) -> None:
        if not rnn.has_weights_on(device, layer):
            flatten(layer)
        elif (buffer := rnn.flatten_layer(layer)) is not None:
            recorder.tag([(buffer, None)], "parameters")

    attention = on_device(F.scaled_dot_product_attention, partial(attend, capability))
    one_hot = on_device(F.one_hot, partial(_one_hot, F.one_hot))
    with (
        attention_in_asked_order(),
        patched(F, scaled_dot_product_attention=attention, one_hot=one_hot),
        patched(
            torch,
            batch_norm=on_device(torch.batch_norm, partial(_batch_norm, torch.batch_norm)),
            ctc_loss=on_device(torch.ctc_loss, _ctc_loss),
        ),
        patched(VF, **layers, **packing),
        # the op behind it would call the CUDA driver, and a CPU build has no such op
        patched(nn.RNNBase, flatten_parameters=flatten_parameters),
    ):
        yield


def _batch_norm(
    original: Callable[..., Tensor],
    input: Tensor,
    weight: Tensor | None,
    *how: Any,
    **named: Any,
) -> Tensor:
    """Make the data dense for cuDNN, which keeps that for the backward pass.

    From `_batch_norm_impl_index` in `ATen/native/Normalization.cpp`.
    """
    with DisableTorchFunction():  # a mode would be asked for each size and stride
        layout = layout_of(input) if runs_on_cudnn(input, weight) else None
    if layout is not None:
        input = input.contiguous(memory_format=layout)
    return original(input, weight, *how, **named)


def _one_hot(original: Callable[..., Tensor], tensor: Tensor, num_classes: int = -1) -> Tensor:
    """Write ones into zeros; tensors without data are compared with every class instead."""
    if num_classes < 1 or tensor.dtype is not torch.int64:
        return original(tensor, num_classes)
    zeros = torch.zeros(*tensor.shape, num_classes, dtype=tensor.dtype, device=tensor.device)
    return zeros.scatter_(-1, tensor.unsqueeze(-1), 1)


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
