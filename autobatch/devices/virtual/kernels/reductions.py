"""Scratch that reductions take while they run: sums, means, extrema and norms.

A reduction whose output has few elements is split over thread blocks; each block writes a partial
result to a buffer, and semaphores tell the last block to combine them. The rules restate
`setReduceConfig`, `ReduceConfig` and `gpu_reduce_kernel` in
`aten/src/ATen/native/cuda/Reduce.cuh`; the order of dimensions is that of
`aten/src/ATen/TensorIterator.cpp`. Integers and booleans are copied to the type of the result
first (`make_reduction` in `aten/src/ATen/native/ReduceOpsUtils.h`).

The gradient of a bias is such a sum: 132 MiB on an H200 for most wide layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from autobatch.devices.virtual.kernels.sizes import ceil_div
from autobatch.gpus.catalogue import GpuSpec
from autobatch.memory.scratch import RESULTS, Steps

__all__ = ["REDUCTIONS", "reduction_scratch", "sum_over_rows"]

aten = torch.ops.aten

_DIMS_AT: dict[Any, int | None] = {
    aten.sum.default: None,
    aten.sum.dim_IntList: 1,
    aten.mean.default: None,
    aten.mean.dim: 1,
    aten.prod.default: None,
    aten.prod.dim_int: 1,
    aten.max.default: None,
    aten.min.default: None,
    aten.amax.default: 1,
    aten.amin.default: 1,
    aten.linalg_vector_norm.default: 2,
    aten.count_nonzero.default: 1,
    aten.count_nonzero.dim_IntList: 1,
    **dict.fromkeys((aten.any.default, aten.all.default), None),
    **dict.fromkeys((aten.any.dim, aten.any.dims, aten.all.dim, aten.all.dims), 1),
    **dict.fromkeys((aten.argmax.default, aten.argmin.default), 1),
    **dict.fromkeys((aten.var.correction, aten.std.correction, aten.var_mean.correction), 1),
}
"""By op: which argument says the dimensions; None where all are reduced."""

_PARTIAL_BYTES = {
    **dict.fromkeys((op for op in _DIMS_AT if op._schema.name in ("aten::any", "aten::all")), 1),
    **dict.fromkeys((op for op in _DIMS_AT if op._schema.name.startswith("aten::arg")), 16),
    **dict.fromkeys(
        (op for op in _DIMS_AT if op._schema.name[:9] in ("aten::var", "aten::std")), 16
    ),
}
"""By op: what a block hands on, where that is no number of the result's type: a truth value, a
number and its place, or a mean with the squares around it."""

_KEEP_TYPE = frozenset(
    (aten.max.default, aten.min.default, aten.amax.default, aten.amin.default, *_PARTIAL_BYTES)
)
"""Ops that take elements as they are; the others add halves up in fp32."""

_COUNTS = (aten.count_nonzero.default, aten.count_nonzero.dim_IntList)
"""Sums of what is not zero, which is told first."""

_HALVES = (torch.float16, torch.bfloat16)
_MAX_THREADS = 512
_FLOAT_BYTES = 4
_WARP = 32
_VECTOR = 4
_VALUES_PER_THREAD = (16, 256)
_INT_MAX = 2**31 - 1
_MOST_HALVINGS = 10
"""So often are tensors halved exactly: up to 2 TiB in one tensor."""
_CHUNK = 65536


@dataclass(frozen=True, slots=True)
class _Dim:
    """A dimension of the input: elements, and bytes from one to the next."""

    size: int
    stride: int
    is_reduced: bool
    out_stride: int = 0


REDUCTIONS = (*_DIMS_AT, aten._foreach_norm.Scalar)
"""The ops that may take scratch."""


def reduction_scratch(
    func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], gpu: GpuSpec
) -> Steps:
    """Return what a reduction takes beside its result, in order.

    Args:
        func: one of `REDUCTIONS`.
        args: its arguments.
        kwargs: its arguments by name.
        gpu: the card, whose multiprocessors decide how often the work is split.
    """
    if func not in _DIMS_AT:
        return [_norm_chunks_bytes(args[0])]
    if not args[0].numel():
        return ()
    data: Tensor = args[0]
    if func in _COUNTS:
        data = torch.empty(data.shape, dtype=torch.bool, device="meta")
        steps = reduction_scratch(
            aten.sum.dim_IntList, (data, sorted(_reduced(func, args))), {}, gpu
        )
        return [data.nbytes, *steps]
    is_counted = func not in _KEEP_TYPE and not (data.is_floating_point() or data.is_complex())
    result = kwargs.get("dtype") or (torch.int64 if is_counted else data.dtype)
    found: list[int] = []
    element = data.element_size()
    if result is not data.dtype and not (data.dtype in _HALVES and result is torch.float32):
        element = result.itemsize
        found.append(data.numel() * element)
    adds_halves = func not in _KEEP_TYPE and result in _HALVES
    partial = _PARTIAL_BYTES.get(func, 4 if adds_halves else result.itemsize)
    dims = _dims(data, _reduced(func, args), element)
    if adds_halves and not _fits_32_bits(dims):  # partial sums do not fit into the result
        found.append(partial * math.prod(dim.size for dim in dims if not dim.is_reduced))
    found += _scratch(dims, element, partial, gpu)
    return [RESULTS, *found] if found else ()


def sum_over_rows(rows: int, width: int, dtype: torch.dtype, gpu: GpuSpec) -> list[int]:
    """Return what the sum of a contiguous matrix over its rows takes beside its result."""
    element = dtype.itemsize
    dims = [_Dim(rows, width * element, True), _Dim(width, element, False, 1)]
    return _scratch(dims, element, _FLOAT_BYTES if dtype in _HALVES else element, gpu)


def _norm_chunks_bytes(tensors: Sequence[Tensor]) -> int:
    """Return the bytes of the partial norms of `_foreach_norm`, one for each chunk and tensor.

    From `foreach_tensor_norm_cuda` in `aten/src/ATen/native/cuda/ForeachReduceOp.cu`.
    """
    chunks = max((ceil_div(tensor.numel(), _CHUNK) for tensor in tensors), default=0)
    doubles = any(tensor.dtype is torch.float64 for tensor in tensors)
    return chunks * len(tensors) * (8 if doubles else 4)


def _reduced(func: Any, args: Sequence[Any]) -> set[int]:
    data, position = args[0], _DIMS_AT[func]
    named = args[position] if position is not None and len(args) > position else None
    if isinstance(named, int):
        named = (named,)
    every = range(data.dim())
    return {dim % data.dim() for dim in named} if named and data.dim() else set(every)


def _dims(data: Tensor, reduced: set[int], element: int) -> list[_Dim]:
    """Return the dimensions as the kernel sees them: reduced ones first, neighbours as one."""
    own = data.element_size()
    is_copied = element != own
    strides = torch.empty(data.shape, device="meta").stride() if is_copied else data.stride()
    kept: list[_Dim] = []
    sums: list[_Dim] = []
    out_stride = 1
    for index in reversed(range(data.dim())):
        size = data.shape[index]
        if index in reduced:
            if size > 1:
                sums.append(_Dim(size, strides[index] * element, True))
            continue
        if size > 1:
            kept.append(_Dim(size, strides[index] * element, False, out_stride))
        out_stride *= size
    sums.sort(key=lambda dim: dim.stride)
    return [*_coalesced(sums), *_coalesced(kept)]


def _coalesced(dims: Sequence[_Dim]) -> list[_Dim]:
    found: list[_Dim] = []
    for dim in dims:
        if found:
            last = found[-1]
            follows = last.size * last.stride == dim.stride
            if follows and last.size * last.out_stride == dim.out_stride:
                found[-1] = replace(last, size=last.size * dim.size)
                continue
        found.append(dim)
    return found


def _fits_32_bits(dims: Sequence[_Dim]) -> bool:
    last = 1 + sum((dim.size - 1) * dim.stride for dim in dims)
    return last <= _INT_MAX and math.prod(dim.size for dim in dims) <= _INT_MAX


def _scratch(
    dims: Sequence[_Dim], element: int, partial: int, gpu: GpuSpec, halvings: int = 0
) -> list[int]:
    """Return buffer and semaphores; those of both halves for what 32 bits cannot index.

    Halves of what was halved often are taken to be equal, and each two pieces to be one, so that
    the time this takes does not grow with a tensor that no card holds.
    """
    if not _fits_32_bits(dims):
        longest = max(range(len(dims)), key=lambda i: (dims[i].size - 1) * dims[i].stride)
        half = dims[longest].size // 2
        larger = dims[longest].size - half
        parts, times = ([larger], 2) if halvings >= _MOST_HALVINGS else ([half, larger], 1)
        return [
            times * size
            for part in parts
            for size in _scratch(
                [replace(d, size=part) if i == longest else d for i, d in enumerate(dims)],
                element,
                partial,
                gpu,
                halvings + 1,
            )
        ]
    sums = [dim for dim in dims if dim.is_reduced]
    kept = [dim for dim in dims if not dim.is_reduced]
    inputs = math.prod(dim.size for dim in sums)
    outputs = math.prod(dim.size for dim in kept)
    along_input = not kept or not sums or sums[0].stride < kept[0].stride
    width, height, vector = (inputs, outputs, 1) if along_input else (outputs, inputs, 1)
    fastest = (sums or kept)[0].stride if along_input and (sums or kept) else element
    if not along_input:
        fastest = kept[0].stride
    if fastest == element:
        if along_input and width >= 128 and len(sums) == 1:
            width //= _VECTOR
        elif not along_input:
            vector = _output_vector(kept, sums, element)
            width //= vector
    block_width, block_height = _block(width, height, _MAX_THREADS // vector)
    step_in, step_out = (block_width, 1) if along_input else (1, block_width)
    least, most = _VALUES_PER_THREAD
    splits_warps = ceil_div(inputs, step_in) >= min(block_height * 16, most)
    if splits_warps:
        step_in *= block_height
    else:
        step_out *= block_height
    grid = ceil_div(outputs // vector, step_out)
    threads = _threads_per_multiprocessor(gpu.compute_capability)
    target = gpu.multiprocessors * (threads // (block_width * block_height))
    values = ceil_div(inputs, step_in)
    if not splits_warps or values < most or grid > target:
        return []
    blocks = max(min(ceil_div(target, grid), ceil_div(values, least)), ceil_div(values, most))
    if blocks <= 1:
        return []
    size = partial * outputs * blocks
    return [size if along_input else size * block_width * vector, 4 * grid]


def _output_vector(kept: Sequence[_Dim], sums: Sequence[_Dim], element: int) -> int:
    vector = _VECTOR
    others = [dim.stride // element for dim in (*sums, *kept[1:])]
    while any(number % vector for number in (kept[0].size, *others)):
        vector //= 2
    return vector


def _block(width: int, height: int, threads: int) -> tuple[int, int]:
    wide, high = (_power_of_two(min(side, threads)) for side in (width, height))
    block_width = min(wide, _WARP)
    block_height = min(high, threads // block_width)
    return min(wide, threads // block_height), block_height


def _power_of_two(number: int) -> int:
    """Return the largest power of two that is at most `number`, and at least 1."""
    return 1 << (max(number, 1).bit_length() - 1)


def _threads_per_multiprocessor(capability: tuple[int, int]) -> int:
    """Return the resident threads that CUDA's programming guide names for a capability.

    >>> _threads_per_multiprocessor((9, 0)), _threads_per_multiprocessor((8, 6))
    (2048, 1536)
    """
    if capability == (7, 5):
        return 1024
    return 1536 if capability in ((8, 6), (8, 7), (8, 9)) or capability[0] == 12 else 2048
