"""Batches of any size from one sample.

Invariant: a builder reads no values and uses plain torch operations only, so it behaves the same
on real tensors and inside a `FakeTensorMode`, where a billion rows cost nothing; every batch
keeps the sample's structure, dtypes, range of values and memory format.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from autobatch.errors import SampleError
from autobatch.support.torch_private import detect_fake_mode
from autobatch.support.wording import listed
from autobatch.workload.dataset import draw
from autobatch.workload.tree import Path, is_sample_list, leaves, map_leaves, map_tensors

__all__ = ["BatchDims", "Rows", "batch_builder", "named_tensors", "repeated", "rows_of"]

BatchDims: TypeAlias = "int | Mapping[str | int, int | None] | None"


def batch_builder(sample: Any, *, batch_dims: BatchDims = None) -> Callable[[int], Any]:
    """Return a function that builds a batch of any number of samples by repeating rows.

    The batch size of the sample is the first dimension that most of its tensors share; of equally
    frequent ones, the first. Tensors with that first dimension are resized; lists, and tuples of
    strings, with that length are repeated; everything else is kept.

    Args:
        sample: one batch (a tensor or any nesting of dicts, sequences, dataclasses, registered
            pytree nodes and plain objects that hold tensors), or a `Dataset` or `DataLoader`, of
            which the largest items are collated (all items are looked at, if that takes seconds
            only). A loader's workers are not started, and the random state is as before.
        batch_dims: where the batch dimension is not the first: one dimension for all tensors, or
            a mapping from a tensor's dotted path, or the beginning or end of that ("inputs.src",
            0, "src"), to its batch dimension; `None` keeps that tensor as it is.

    Returns:
        `build(n)`: the sample's structure with contiguous CPU tensors of n rows (channels-last
        where the sample's were), each a fresh leaf that requires grad where the sample's did.

    Raises:
        SampleError: no tensor has a batch dimension, the batch is empty, `batch_dims` does not
            match, an item of the data set cannot be read, or its items cannot be collated.

    >>> build = batch_builder({"x": torch.tensor([[1, 2], [3, 4]]), "scale": 0.5})
    >>> build(3)
    {'x': tensor([[1, 2],
            [3, 4],
            [1, 2]]), 'scale': 0.5}
    """
    return repeated(draw(sample).batch, batch_dims)


def repeated(batch: Any, batch_dims: BatchDims = None) -> Callable[[int], Any]:
    """Return a function that repeats the rows of one batch, as `batch_builder` describes it."""
    rows = rows_of(map_tensors(_on_cpu, batch), batch_dims=batch_dims)

    def build(n: int) -> Any:
        def resize(path: Path, leaf: Any) -> Any:
            if isinstance(leaf, Tensor):
                return _resized(leaf, rows.dims.get(path), n)
            if _is_per_sample(leaf, rows.size):
                return type(leaf)(_fresh(leaf[row % rows.size]) for row in range(n))
            return leaf

        return map_leaves(resize, rows.batch, stop=_is_whole)

    return build


@dataclass(frozen=True, slots=True)
class Rows:
    """A batch whose samples can be counted and cut.

    Attributes:
        batch: the batch as it was given.
        size: its number of samples.
        dims: the batch dimension of each tensor that has one, by path.
        whole: the paths of tensors of which, by `batch_dims`, every part gets all.
    """

    batch: Any
    size: int
    dims: Mapping[Path, int]
    whole: frozenset[Path]

    def cut(self, start: int, stop: int) -> Any:
        """Return samples `start` to `stop` in the batch's own structure; tensors are views.

        Raises:
            SampleError: a tensor does not have one row for each sample, so it is unknown which
                part of it belongs to these samples.
        """

        def visit(path: Path, leaf: Any) -> Any:
            if isinstance(leaf, Tensor):
                if path in self.dims:
                    return leaf.narrow(self.dims[path], start, stop - start)
                if leaf.dim() and path not in self.whole:
                    raise SampleError(
                        f"a batch of {self.size} samples has to be cut, but {_dotted(path)} has "
                        f"the shape {tuple(leaf.shape)}: let the loader yield micro-batches, or "
                        f"pass batch_dims={{{_dotted(path)!r}: None}} if each needs all of it"
                    )
            elif _is_per_sample(leaf, self.size):
                return leaf[start:stop]
            return leaf

        return map_leaves(visit, self.batch, stop=_is_whole)


def rows_of(batch: Any, *, batch_dims: BatchDims = None) -> Rows:
    """Count the samples of a batch, by the rules of `batch_builder`.

    Raises:
        SampleError: no tensor has a batch dimension, the batch is empty, or `batch_dims` does not
            match.

    >>> rows = rows_of({"x": torch.tensor([[1, 2], [3, 4], [5, 6]]), "id": ["a", "b", "c"]})
    >>> rows.size, rows.cut(1, 3)
    (3, {'x': tensor([[3, 4],
            [5, 6]]), 'id': ['b', 'c']})
    """
    tensors = named_tensors(batch)
    stated: dict[Path, int | None] = {}
    for key, dim in ({} if isinstance(batch_dims, int) else batch_dims or {}).items():
        covered = [path for path in tensors if _covers(key, path)]
        if not covered:
            raise SampleError(
                f"batch_dims names {key!r}, but the sample's tensors are {_shapes(tensors)}"
            )
        for path in covered:
            stated.setdefault(path, dim)
    default = batch_dims if isinstance(batch_dims, int) else 0
    dims, size = _locate_batch(tensors, stated, default)
    return Rows(batch, size, dims, frozenset(path for path, dim in stated.items() if dim is None))


def named_tensors(batch: Any) -> dict[Path, Tensor]:
    """Return the tensors that may have a batch dimension by their path, such as ("inputs", "0").

    Those in a list of one mapping a sample have none: each belongs to its sample.

    Raises:
        SampleError: one of them is packed.
    """
    found = {}
    for path, leaf in leaves(batch, stop=_is_whole):
        if isinstance(leaf, PackedSequence):
            raise SampleError(
                "a PackedSequence cannot be resized: pass the padded tensor and the lengths, or a "
                "Workload with its own batch function"
            )
        if isinstance(leaf, Tensor):
            found[path] = leaf
    return found


def _is_whole(node: Any) -> bool:
    """Say whether the rows of a container are not those of the tensors in it."""
    return is_sample_list(node) or isinstance(node, PackedSequence)


def _locate_batch(
    tensors: Mapping[Path, Tensor], stated: Mapping[Path, int | None], default: int
) -> tuple[dict[Path, int], int]:
    """Return the batch dimension of every tensor to resize, and the sample's batch size."""
    dims: dict[Path, int] = {}
    for path, tensor in tensors.items():
        dim, rank = stated.get(path, default), tensor.dim()
        if dim is None:
            continue
        if -rank <= dim < rank:
            dims[path] = dim % rank
        elif path in stated:
            raise SampleError(
                f"batch_dims puts the batch of {_dotted(path)} in dimension {dim}, but its "
                f"shape is {tuple(tensor.shape)}"
            )
    if not dims:
        raise SampleError(
            f"the sample has no tensor with a batch dimension ({_shapes(tensors)}): pass one "
            "batch of tensors, such as sample=(inputs, labels), or a DataLoader"
        )

    sizes = {path: tensors[path].shape[dim] for path, dim in dims.items()}
    voters = [path for path in dims if path in stated] or list(dims)
    votes = Counter(sizes[path] for path in voters)
    size = votes.most_common(1)[0][0]
    if stated and len(votes) > 1:
        raise SampleError(
            f"batch_dims gives different batch sizes, {sorted(votes)}: the sample's tensors "
            f"are {_shapes(tensors)}"
        )
    if size == 0:
        raise SampleError(
            f"the sample's batch is empty ({_shapes(tensors)}): pass a batch of one or more samples"
        )
    return {path: dim for path, dim in dims.items() if sizes[path] == size}, size


def _covers(key: str | int, path: Path) -> bool:
    """Say whether a key of `batch_dims` is a tensor's path, or its beginning or end."""
    parts = tuple(str(key).split("."))
    return path[: len(parts)] == parts or path[-len(parts) :] == parts


def _dotted(path: Path) -> str:
    return ".".join(path) or "the sample"


def _shapes(tensors: Mapping[Path, Tensor]) -> str:
    shown = [f"{_dotted(path)} {tuple(tensor.shape)}" for path, tensor in tensors.items()]
    return listed(shown, 8) or "no tensors"


def _is_per_sample(leaf: Any, size: int) -> bool:
    """Say whether a leaf holds one Python object per sample, which (224, 224) does not."""
    if isinstance(leaf, tuple):
        return len(leaf) == size and all(isinstance(item, (str, bytes, Mapping)) for item in leaf)
    return isinstance(leaf, list) and len(leaf) == size


def _fresh(item: Any) -> Any:
    """Copy a sample's own mapping with its tensors; rows share objects of other kinds."""
    if not isinstance(item, Mapping):
        return item
    return map_tensors(lambda leaf: _resized(leaf, None, 1), item)


def _on_cpu(leaf: Tensor) -> Tensor:
    """Bring a tensor to the CPU; one on `meta` has no values, so zeros stand in for them."""
    if leaf.is_meta:
        values = torch.zeros((), dtype=leaf.dtype, device="cpu").expand(leaf.shape)
    else:
        values = leaf.detach().cpu()
    return values.requires_grad_(leaf.requires_grad)


def _resized(leaf: Tensor, dim: int | None, n: int) -> Tensor:
    """Return a fresh tensor of n rows along `dim`, or a copy where there is no such dimension."""
    mode = detect_fake_mode()
    source = (mode.from_tensor(leaf) if mode else leaf).detach()
    if dim is None:
        rows = source.clone()
    else:
        index = torch.arange(n, device=leaf.device) % leaf.shape[dim]
        rows = source.index_select(dim, index).contiguous(memory_format=_memory_format(leaf))
    return rows.requires_grad_(leaf.requires_grad)


def _memory_format(leaf: Tensor) -> torch.memory_format:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    last = formats.get(leaf.dim(), torch.contiguous_format)
    plain = leaf.is_contiguous() or not leaf.is_contiguous(memory_format=last)
    return torch.contiguous_format if plain else last
