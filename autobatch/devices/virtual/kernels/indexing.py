"""What CUDA's kernels that index, sort and scan allocate beside their results.

- `embedding` and `index` copy indices that are not contiguous (`Embedding.cu` and
  `TensorAdvancedIndexing.cpp` in `aten/src/ATen/native`).
- The gradient of an embedding sorts its indices from 3,073 on, and adds rows up in parts of ten
  (`embedding_backward_cuda_kernel` in `EmbeddingBackwardKernel.cu`, `embedding_dense_backward_cuda`
  in `Embedding.cu`). How many parts there are depends on values; PyTorch allocates for the most.
- Adding to indexed places sorts them (`index_put_with_sort_kernel` in `Indexing.cu`).
- Sorting and running sums: `Sort.cpp`, `Sort.cu` and `ScanKernels.cpp` there.

The temporary memory of CUB's radix sort is that of its onesweep algorithm: both buffers, and 1 KiB
a tile. Sizes of tiles were seen in PyTorch's CUDA code on a simulated runtime.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from autobatch.devices.virtual.kernels.sizes import ceil_div, copies_of, round_up
from autobatch.gpus.catalogue import GpuSpec
from autobatch.memory.scratch import RESULT, RESULTS, Steps

__all__ = ["INDEXING", "indexing_scratch"]

aten = torch.ops.aten

_UNSORTED_INDICES = 3072
_ROWS_IN_A_PART = 10
_WARP = 32
_INDEX = 8
_FLOAT = 4
_SORTED_IN_A_BLOCK = 1024
_TILES = (((9, 0), (5376, 4608)), ((8, 0), (3072, 3840)), ((0, 0), (2816, 2816)))
"""Elements in a tile of a sort from a compute capability on: of keys of 4 bytes, and of 8."""

_WHOLE = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32)


def indexing_scratch(
    func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], gpu: GpuSpec
) -> Steps:
    """Return what a kernel takes beside its results, in order.

    Args:
        func: one of `INDEXING`.
        args: its arguments.
        kwargs: its arguments by name.
        gpu: the card, whose compute capability decides how a sort is tiled.
    """
    return _RULES[func](args, kwargs, gpu)


def _embedding(args: Sequence[Any], kwargs: Mapping[str, Any], gpu: GpuSpec) -> Steps:
    indices: Tensor = args[1]
    return copies_of(indices) if indices.dim() != 1 else []


def _embedding_backward(args: Sequence[Any], kwargs: Mapping[str, Any], gpu: GpuSpec) -> Steps:
    gradient, indices, weights = args[:3]
    copies = copies_of(indices, gradient)
    count, width = indices.numel(), gradient.shape[-1]
    if count <= _UNSORTED_INDICES or not width:
        return copies
    each = indices.element_size()
    rows = min(count, weights)
    parts = count // _ROWS_IN_A_PART + rows
    first = len(copies)
    return [
        *copies,
        *[count * each] * 3,
        _radix_sort_bytes(gpu, count, each, each, weights.bit_length()),
        ~(first + 3),
        ~(first + 2),
        RESULT,
        count * each,
        each,
        count * each,
        ~(first + 6),
        *[rows * each] * 2,
        each,
        parts * each,
        parts * round_up(width, _WARP) * _FLOAT,
    ]


def _index(args: Sequence[Any], kwargs: Mapping[str, Any], gpu: GpuSpec) -> Steps:
    indices = _expanded([index for index in args[1] if index is not None])
    if len({index.stride() for index in indices}) < 2:
        return []
    return copies_of(*indices)


def _index_put(args: Sequence[Any], kwargs: Mapping[str, Any], gpu: GpuSpec) -> Steps:
    accumulates = args[3] if len(args) > 3 else kwargs.get("accumulate", False)
    indices = _expanded([index for index in args[1] if index is not None])
    if not accumulates or not indices or indices[0].dtype is torch.bool:
        return []
    values: Tensor = args[2]
    places = indices[0].numel() * _INDEX
    is_moved = args[1][0] is None or not values.is_contiguous()
    bits = max(args[0].numel().bit_length(), 1)
    sort = _radix_sort_bytes(gpu, indices[0].numel(), _INDEX, _INDEX, bits)
    moved = [values.nbytes] * is_moved
    return [RESULTS, places, places, ~1, *moved, *[places] * 3, sort]


def _sort(args: Sequence[Any], kwargs: Mapping[str, Any], gpu: GpuSpec) -> Steps:
    data: Tensor = args[0]
    is_stable = isinstance(args[1] if len(args) > 1 else None, bool)
    dim = args[2 if is_stable else 1] if len(args) > 1 + is_stable else kwargs.get("dim", -1)
    if not data.dim() or not data.numel():
        return []
    length, count, width = data.shape[dim], data.numel(), data.element_size()
    if length <= _SORTED_IN_A_BLOCK:
        return [RESULTS, length * _INDEX]
    sort = _radix_sort_bytes(gpu, count, width, _INDEX, 8 * width)
    if count == length:
        return [RESULTS, count * _INDEX, sort]
    return [RESULTS, count * _INDEX, count * _INDEX, count * width, sort]


def _scan(args: Sequence[Any], kwargs: Mapping[str, Any], gpu: GpuSpec) -> Steps:
    """Return the input as the result's type, to which whole numbers are converted first, and dense.

    The result is dense, as is that of `topk`.
    """
    data: Tensor = args[0]
    result = kwargs.get("dtype") or (torch.int64 if data.dtype in _WHOLE else data.dtype)
    copies = copies_of(data)
    if result is not data.dtype:
        copies = [data.numel() * result.itemsize] * (1 + len(copies))
    return [RESULTS, *copies] if copies else ()


def _topk(args: Sequence[Any], kwargs: Mapping[str, Any], gpu: GpuSpec) -> Steps:
    copies = copies_of(args[0])
    return [RESULTS, *copies] if copies else ()


def _unfold_backward(args: Sequence[Any], kwargs: Mapping[str, Any], gpu: GpuSpec) -> Steps:
    """Return the places along the dimension (`unfold_backward` in `UnfoldBackward.cpp`)."""
    sizes, dim = args[1:3]
    return [RESULT, sizes[dim] * _INDEX] if sizes else ()


def _expanded(indices: Sequence[Tensor]) -> list[Tensor]:
    """Return indices as the kernel sees them, all of one shape; masks as they are."""
    if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
        return list(indices)
    shape = torch.broadcast_shapes(*(index.shape for index in indices))
    return [_layout(index).expand(shape) for index in indices]


def _layout(tensor: Tensor) -> Tensor:
    return torch.empty_strided(
        tuple(tensor.shape), tensor.stride(), dtype=tensor.dtype, device="meta"
    )


def _radix_sort_bytes(gpu: GpuSpec, count: int, key: int, value: int, bits: int) -> int:
    """Return the temporary bytes of CUB's radix sort of pairs.

    >>> from autobatch.gpus.catalogue import find_gpu
    >>> [_radix_sort_bytes(find_gpu(name), 65536, 8, 8, 16) for name in ("t4", "l4", "h200")]
    [1077759, 1071615, 1068543]
    """
    if count <= _UNSORTED_INDICES:
        return 1
    tile = next(tiles for since, tiles in _TILES if gpu.compute_capability >= since)[key == _INDEX]
    passes = ceil_div(bits, 8)
    buffers = round_up(count * key, 256) + round_up(count * value, 256)
    return buffers + 2048 * passes + 512 + 1024 * ceil_div(count, tile) - 1


_RULES = {
    aten.embedding.default: _embedding,
    aten.embedding_dense_backward.default: _embedding_backward,
    aten.index.Tensor: _index,
    aten.index_put.default: _index_put,
    aten.index_put_.default: _index_put,
    aten._index_put_impl_.default: _index_put,
    aten.sort.default: _sort,
    aten.sort.stable: _sort,
    aten.cumsum.default: _scan,
    aten.cumprod.default: _scan,
    aten.topk.default: _topk,
    aten.unfold_backward.default: _unfold_backward,
}

INDEXING = tuple(_RULES)
"""The ops that may take scratch."""
