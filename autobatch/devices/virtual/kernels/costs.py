"""FLOPs and bytes of a call of an op, as the card's kernels compute and move them.

FLOPs of matrix products, convolutions and attention are those of `torch.utils.flop_counter`, with
half of them where attention is causal: its fused kernels skip what is masked. Bytes are those of
the tensors that a kernel reads and writes, each once, except where it goes over them again; views
cost nothing.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from autobatch.devices.virtual.kernels.convolutions import convolution_settings
from autobatch.devices.virtual.kernels.memory_formats import layout_of
from autobatch.gpus.work import Kind, OpWork
from autobatch.support.torch_private import OpOverload

__all__ = ["Traits", "costs_of", "traits_of"]

aten = torch.ops.aten

_PRECISIONS = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "fp8",
    torch.float8_e5m2: "fp8",
}

_KINDS: Mapping[str, Kind] = {
    **dict.fromkeys(
        "mm addmm bmm baddbmm _addmm_activation mv addmv dot vdot _scaled_mm _grouped_mm".split(),
        "matmul",
    ),
    **dict.fromkeys("convolution convolution_backward".split(), "convolution"),
    **dict.fromkeys("_cudnn_rnn _cudnn_rnn_backward".split(), "recurrent"),
    **dict.fromkeys(
        """
        native_layer_norm native_layer_norm_backward native_batch_norm native_batch_norm_backward
        native_group_norm native_group_norm_backward cudnn_batch_norm cudnn_batch_norm_backward
        _native_batch_norm_legit _fused_rms_norm _fused_rms_norm_backward
        """.split(),
        "norm",
    ),
    **dict.fromkeys(
        """
        sum mean amax amin max min argmax argmin prod any all var std var_mean std_mean cumsum
        cumprod logsumexp _softmax _log_softmax _softmax_backward_data _log_softmax_backward_data
        _safe_softmax linalg_vector_norm norm topk sort max_pool2d_with_indices avg_pool2d
        adaptive_avg_pool2d _adaptive_avg_pool2d nll_loss_forward nll_loss2d_forward
        """.split(),
        "reduction",
    ),
    **dict.fromkeys(
        """
        embedding index index_select gather take embedding_dense_backward index_put _index_put_impl
        index_put_ _index_put_impl_ index_add index_add_ scatter scatter_ scatter_add scatter_add_
        index_copy index_copy_ nll_loss_backward nll_loss2d_backward
        max_pool2d_with_indices_backward
        """.split(),
        "indexing",
    ),
    **dict.fromkeys(
        """
        clone copy_ cat stack slice_backward select_backward constant_pad_nd roll repeat flip
        unfold_backward im2col col2im split_with_sizes_copy chunk_cat
        """.split(),
        "copy",
    ),
}

_FREE = frozenset(
    """
    empty empty_like empty_strided new_empty new_empty_strided _unsafe_view _reshape_alias lift
    lift_fresh set_ resize_ _resize_output_ record_stream _local_scalar_dense is_same_size
    _has_same_storage_numel sym_size is_pinned
    """.split()
)
"""Ops without a kernel."""

_MADE = frozenset(
    """
    ones_like zeros_like full_like rand_like randn_like new_zeros new_ones new_full bernoulli_
    zero_ fill_ normal_ uniform_ random_
    """.split()
)
"""Ops that write a result and read no tensor."""

_PICKED = frozenset("embedding index index_select gather take".split())
"""Ops that read of their first tensor only what they give out."""

_PLACED = frozenset(
    "index_put_ _index_put_impl_ index_add_ scatter_ scatter_add_ index_copy_".split()
)
"""Ops that write of their first tensor only what they are given."""

_AGAIN: Mapping[str, tuple[int, ...]] = {
    "native_batch_norm": (0,),
    "cudnn_batch_norm": (0,),
    "_native_batch_norm_legit": (0,),
    "native_batch_norm_backward": (0, 1),
    "cudnn_batch_norm_backward": (0, 1),
    "native_group_norm": (0,),
    "native_group_norm_backward": (0, 1),
    "native_layer_norm_backward": (0, 1),
    "_fused_rms_norm_backward": (0, 1),
}
"""Arguments that a kernel goes over twice: statistics first, then what is made with them."""

_TENSORS_A_LAUNCH = 48
"""Tensors of one launch of a `foreach` kernel, about (`MultiTensorApply.cuh`: 110 for one list, 36
for four; a tensor of several chunks takes more)."""


@dataclass(frozen=True, slots=True)
class Traits:
    """What an op's schema says of what it reads and writes.

    Attributes:
        name: of the op, without its overload.
        kind: what its kernels have in common with others.
        is_free: whether it has no kernel, as views.
        written: names of the arguments that it writes to.
        is_overwritten: whether it reads none of those.
        makes_new: whether its results are tensors of their own.
        names: of its arguments, in order.
    """

    name: str
    kind: Kind
    is_free: bool
    written: frozenset[str]
    is_overwritten: bool
    makes_new: bool
    names: tuple[str, ...]


@functools.cache
def traits_of(func: OpOverload) -> Traits:
    """Return what an op's schema says of it."""
    schema, name = func._schema, func._opname
    written = frozenset(
        argument.name
        for argument in schema.arguments
        if argument.alias_info is not None
        and argument.alias_info.is_write
        and not (name.startswith("_fused_") and argument.name == "grads")  # with a scale only
    )
    aliases = [result.alias_info for result in schema.returns if result.alias_info is not None]
    is_view = not written and bool(aliases)
    outs = {argument.name for argument in schema.arguments if argument.is_out}
    return Traits(
        name=name,
        kind=_kind(name),
        is_free=name in _FREE or is_view or not (schema.returns or written),
        written=written,
        is_overwritten=bool(outs) or name in _MADE or name == "copy_",
        makes_new=bool(schema.returns) and not aliases,
        names=tuple(argument.name for argument in schema.arguments),
    )


def _kind(name: str) -> Kind:
    if name.startswith(("_foreach_", "_fused_adam", "_fused_sgd", "_fused_adagrad", "_amp_")):
        return "optimizer"
    if "_attention" in name:
        return "cudnn_attention" if "cudnn" in name else "attention"
    return _KINDS.get(name, "elementwise")


def costs_of(
    func: OpOverload,
    traits: Traits,
    named: Mapping[str, Any],
    inputs: Mapping[str, list[Tensor]],
    results: list[Tensor],
    output: Any,
) -> list[OpWork]:
    """Return the work of a call; that of the gradients of a convolution apart.

    Args:
        func: the op.
        traits: what its schema says.
        named: its arguments by name.
        inputs: of each argument, the tensors in it that are on the card.
        results: new tensors on the card that it gave.
        output: what it returned.
    """
    if traits.name == "convolution":
        return _convolution(named, output)
    if traits.name == "convolution_backward":
        return _convolution_backward(named, output)
    made = sum(map(_touched, results))
    size_bytes = _moved(traits, inputs, made)
    tensors = [tensor for group in inputs.values() for tensor in group] + results
    precision = _precision(traits.kind, tensors)
    flops, product = 0.0, None
    if traits.kind == "matmul":
        flops, product = _matmul(traits.name, named)
    elif traits.kind in ("attention", "cudnn_attention"):
        flops = _attention(func, named, output)
    elif traits.kind == "recurrent":
        flops = _recurrent(traits.name, named)
    return [
        OpWork(
            op=traits.name,
            kind=traits.kind,
            precision=precision,
            flops=flops,
            bytes=float(size_bytes),
            product=product,
            launches=_launches(traits.name, inputs, named),
        )
    ]


def _moved(traits: Traits, inputs: Mapping[str, list[Tensor]], made: int) -> int:
    """Return the bytes that a kernel reads and writes."""
    name = traits.name
    written = sum(sum(map(_touched, inputs.get(each, ()))) for each in traits.written)
    if name in _MADE:
        return made + written
    read = {
        each: sum(map(_touched, tensors))
        for each, tensors in inputs.items()
        if not (each in traits.written and traits.is_overwritten)
    }
    if name in _PLACED:
        values = sum(size for each, size in read.items() if each not in traits.written)
        return made + 2 * values
    if name in _PICKED:
        read[traits.names[0]] = min(read[traits.names[0]], max(made, 1))
    if name.startswith("nll_loss"):  # one score of each row; which class, is all that counts
        read["self"] = read.get("target", 0)
    for place in _AGAIN.get(name, ()):
        read[traits.names[place]] *= 2
    return sum(read.values()) + made + written


def _touched(tensor: Tensor) -> int:
    """Return the bytes of a tensor's elements, those that repeat along a dimension once."""
    shape, strides = tensor.shape, tensor.stride()
    if 0 not in strides:
        return tensor.numel() * tensor.element_size()
    sizes = (size for size, stride in zip(shape, strides, strict=True) if stride or not size)
    return math.prod(sizes) * tensor.element_size()


def _precision(kind: Kind, tensors: Sequence[Tensor]) -> str:
    """Return what a kernel computes in, by its first floating point tensor."""
    dtypes = (tensor.dtype for tensor in tensors if tensor.is_floating_point())
    found = _PRECISIONS.get(next(dtypes, torch.int64), "other")
    if found == "fp32" and kind in ("matmul", "recurrent") and _allows_tf32(kind):
        return "tf32"
    return found


def _allows_tf32(kind: Kind) -> bool:
    """Whether fp32 products may run in TF32: PyTorch's default is no, and yes for cuDNN."""
    if kind == "matmul":
        return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")
    if kind == "recurrent":
        settings: Any = torch.backends.cudnn
        return bool(settings.rnn.fp32_precision == "tf32")
    return convolution_settings()[1]


def _formula(func: Any) -> Callable[..., int]:
    return flop_registry[func]  # type: ignore[no-any-return]


def _matmul(
    name: str, named: Mapping[str, Any]
) -> tuple[float, tuple[float, float, float, float] | None]:
    """Return the FLOPs and the shape (batch, rows, columns, depth) of a matrix product."""
    values = [named[each] for each in named if isinstance(named[each], Tensor)]
    if name in ("_scaled_mm", "_grouped_mm"):
        first, second = values[:2]
    else:
        first, second = [value for value in values if value.dim() or name == "dot"][-2:]
    if first.dim() < 2 or second.dim() < 2:  # a vector: memory limits it
        return 2.0 * max(first.numel(), second.numel()), None
    batch = math.prod(first.shape[:-2]) if first.dim() == second.dim() else 1
    rows, depth, columns = first.shape[-2], first.shape[-1], second.shape[-1]
    if first.dim() == second.dim() == 2 and name == "_grouped_mm":  # gradients of weights
        batch = 1
    formula = {
        "mm": aten.mm,
        "addmm": aten.mm,
        "_addmm_activation": aten.mm,
        "bmm": aten.bmm,
        "baddbmm": aten.bmm,
    }.get(name)
    if formula is None:
        flops = 2.0 * batch * rows * columns * depth
    else:
        flops = float(_formula(formula)(first, second, out_val=None))
    return flops, (float(batch), float(rows), float(columns), float(depth))


def _convolution(named: Mapping[str, Any], output: Tensor) -> list[OpWork]:
    """Return the work of a forward convolution, a product over patches (implicit GEMM)."""
    data, weight, groups = named["input"], named["weight"], named["groups"]
    bias, transposed = named["bias"], named["transposed"]
    if transposed:
        rows, columns = _places(data), math.prod(weight.shape[1:])
    else:
        rows, columns = _places(output), weight.shape[0] // groups
    extra = 0 if bias is None else 2 * _touched(output)
    return _convolved(
        "convolution",
        named,
        _convolution_flops(named, output),
        [data, weight, output],
        extra_bytes=extra,
        rows=rows,
        columns=columns,
        launches=1.0 if bias is None else 2.0,
    )


def _convolution_backward(named: Mapping[str, Any], output: Sequence[Any]) -> list[OpWork]:
    """Return the work of the gradients of data and of weight, each a product of its own.

    Each has the FLOPs of the forward pass: it multiplies the same pairs of places. The formula of
    `torch.utils.flop_counter` for both does not divide by the groups.
    """
    gradient, data, weight = named["grad_output"], named["input"], named["weight"]
    groups, wanted = named["groups"], named["output_mask"]
    flops = _convolution_flops(named, gradient)
    found: list[OpWork] = []
    if wanted[0] and output[0] is not None:
        found += _convolved(
            "convolution_backward_data",
            named,
            flops,
            [gradient, weight, output[0]],
            rows=_places(data),
            columns=data.shape[1] // groups,
        )
    if wanted[1] and output[1] is not None:
        found += _convolved(
            "convolution_backward_weight",
            named,
            flops,
            [gradient, data, output[1]],
            rows=gradient.shape[1] // groups,
            columns=weight.numel() // max(gradient.shape[1], 1),
        )
    if wanted[2] and output[2] is not None:
        found.append(
            OpWork(
                op="convolution_backward_bias",
                kind="reduction",
                precision=_PRECISIONS.get(weight.dtype, "other"),
                flops=0.0,
                bytes=float(_touched(gradient)),
            )
        )
    return found


def _convolution_flops(named: Mapping[str, Any], result: Tensor) -> float:
    how = [named[name] for name in ("stride", "padding", "dilation", "transposed")]
    formula = _formula(aten.convolution)
    return float(formula(named["input"], named["weight"], None, *how, out_val=result))


def _places(tensor: Tensor) -> int:
    """Return how many places a tensor of features has, in all of its samples."""
    return tensor.numel() // max(tensor.shape[1], 1)


def _convolved(
    op: str,
    named: Mapping[str, Any],
    flops: float,
    tensors: Sequence[Tensor],
    *,
    rows: int,
    columns: int,
    extra_bytes: int = 0,
    launches: float = 1.0,
) -> list[OpWork]:
    """Return the work of one direction of a convolution, and what it converts beside."""
    data, weight, groups = named["input"], named["weight"], named["groups"]
    precision = _PRECISIONS.get(weight.dtype, "other")
    if precision == "fp32" and _allows_tf32("convolution"):
        precision = "tf32"
    kind: Kind = "convolution" if groups == 1 else "grouped_convolution"
    if groups > 1 and weight.shape[1] == 1:
        kind = "depthwise_convolution"
    depth = flops / max(2.0 * groups * rows * columns, 1.0)
    work = OpWork(
        op=op,
        kind=kind,
        precision=precision,
        flops=flops,
        bytes=float(sum(map(_touched, tensors)) + extra_bytes),
        product=(float(groups), float(rows), float(columns), depth),
        launches=launches,
    )
    is_nhwc = layout_of(data, weight) is not torch.contiguous_format
    if is_nhwc or kind == "depthwise_convolution" or precision not in ("fp16", "bf16", "tf32"):
        return [work]
    converted = [tensor for tensor in tensors if tensor.shape != weight.shape]
    conversion = OpWork(
        op="convolution_conversion",
        kind="conversion",
        precision=precision,
        flops=0.0,
        bytes=2.0 * sum(map(_touched, converted)),
        launches=float(len(converted)),
    )
    return [work, conversion]


def _attention(func: OpOverload, named: Mapping[str, Any], output: Any) -> float:
    formula = flop_registry.get(func._overloadpacket)
    if formula is None:
        return 0.0
    flops = float(formula(*named.values(), out_val=output))
    return flops * (0.5 if named.get("is_causal") else 1.0)


def _recurrent(name: str, named: Mapping[str, Any]) -> float:
    """Return the FLOPs of all layers of an RNN: every weight matrix times every input."""
    weights, data = named["weight"], named["input"]
    steps = data.numel() // max(data.shape[-1], 1)
    elements = sum(weight.numel() for weight in weights if weight.dim() == 2)
    return float(2 * elements * steps * (2 if name.endswith("_backward") else 1))


def _launches(name: str, inputs: Mapping[str, list[Tensor]], named: Mapping[str, Any]) -> float:
    if name.startswith(("_foreach_", "_fused_", "_amp_foreach")):
        longest = max((len(tensors) for tensors in inputs.values()), default=1)
        return float(max(math.ceil(longest / _TENSORS_A_LAUNCH), 1))
    if name in ("_cudnn_rnn", "_cudnn_rnn_backward"):
        steps = named["input"].shape[1 if named.get("batch_first") else 0]
        return float(max(steps * named["num_layers"], 1))
    if name in ("native_batch_norm_backward", "native_layer_norm_backward"):
        return 2.0
    if "attention" in name and name.endswith("backward"):
        return 3.0
    return 1.0
