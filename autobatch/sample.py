"""Batches of any size from one sample.

Invariant: a builder reads no values and uses plain torch operations only, so it behaves the same
on real tensors and inside a `FakeTensorMode`, where a billion rows cost nothing; every batch
keeps the sample's structure, dtypes, range of values and memory format.
"""

from __future__ import annotations

import copy
import dataclasses
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch._guards import detect_fake_mode
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import SUPPORTED_NODES
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from autobatch.errors import SampleError

__all__ = ["BatchDims", "batch_builder", "dataset_length"]

BatchDims: TypeAlias = "int | Mapping[str | int, int | None] | None"
Path: TypeAlias = tuple[str, ...]
T = TypeVar("T")

ITEMS_SEEN = 64
SECONDS_LOOKING = 5.0
# Even, because mixup wants pairs, and seldom the size of anything that is not the batch.
ITEMS_COLLATED = 6


def batch_builder(sample: Any, *, batch_dims: BatchDims = None) -> Callable[[int], Any]:
    """Return a function that builds a batch of any number of samples by repeating rows.

    The batch size of the sample is the first dimension that most of its tensors share; of sizes
    equally frequent the one seen first. Tensors with that first dimension are resized; lists and
    tuples of strings with that length are repeated; everything else is kept.

    Args:
        sample: one batch (a tensor or any nesting of dicts, sequences, dataclasses, registered
            pytree nodes and plain objects that hold tensors), or a `Dataset` or `DataLoader`, of
            which the item with most bytes among some evenly spaced ones is collated. A loader's
            workers are not started, and the global random state is left as it was.
        batch_dims: where the batch dimension is not the first: one dimension for all tensors,
            or a mapping from a tensor's dotted path, or either end of it ("src", "inputs.src",
            0), to its batch dimension; `None` keeps that tensor as it is.

    Returns:
        `build(n)`: the sample's structure with contiguous CPU tensors of n rows (channels-last
        where the sample's were), each a fresh leaf that requires grad where the sample's did.

    Raises:
        SampleError: no tensor has a batch dimension, the batch is empty, `batch_dims` does not
            match, or the data set has no item that can be collated.

    >>> build = batch_builder({"x": torch.tensor([[1, 2], [3, 4]]), "scale": 0.5})
    >>> build(3)
    {'x': tensor([[1, 2],
            [3, 4],
            [1, 2]]), 'scale': 0.5}
    """
    example = _map(_on_cpu, _draw(sample))
    leaves = {path: leaf for path, leaf in _leaves(example) if isinstance(leaf, Tensor)}
    dims, size = _locate_batch(leaves, batch_dims)

    def build(n: int) -> Any:
        def resize(path: Path, leaf: Any) -> Any:
            if isinstance(leaf, Tensor):
                return _resized(leaf, dims.get(path), n)
            if _is_per_sample(leaf, size):
                return type(leaf)(leaf[row % size] for row in range(n))
            return leaf

        return _map(resize, example)

    return build


def dataset_length(sample: Any) -> int | None:
    """Return how many samples an epoch of a data set or loader has; None for anything else.

    >>> dataset_length(DataLoader(torch.utils.data.TensorDataset(torch.zeros(10, 3))))
    10
    """
    if isinstance(sample, DataLoader):
        if sample.batch_sampler is None or isinstance(sample.dataset, IterableDataset):
            return None
        return _length(sample.sampler)
    return _length(sample) if _is_dataset(sample) else None


def _length(sized: Any) -> int | None:
    try:
        return len(sized)
    except (TypeError, NotImplementedError):
        return None


def _locate_batch(
    leaves: Mapping[Path, Tensor], batch_dims: BatchDims
) -> tuple[dict[Path, int], int]:
    """Return the batch dimension of every tensor to resize, and the sample's batch size."""
    default, named = (batch_dims, {}) if isinstance(batch_dims, int) else (0, batch_dims or {})
    chosen = {path: _named_dim(path, named, default) for path in leaves}
    explicit = {path for path in leaves if any(_covers(key, path) for key in named)}
    for key in named:
        if not any(_covers(key, path) for path in leaves):
            raise SampleError(
                f"batch_dims names {key!r}, but the sample's tensors are {_shapes(leaves)}"
            )

    dims: dict[Path, int] = {}
    for path, dim in chosen.items():
        rank = leaves[path].dim()
        if dim is None:
            continue
        if -rank <= dim < rank:
            dims[path] = dim % rank
        elif path in explicit:
            raise SampleError(
                f"batch_dims puts the batch of {_dotted(path)} in dimension {dim}, but its "
                f"shape is {tuple(leaves[path].shape)}"
            )
    if not dims:
        raise SampleError(
            f"the sample has no tensor with a batch dimension ({_shapes(leaves)}): pass one "
            "batch of tensors, such as sample=(inputs, labels), or a DataLoader"
        )

    sizes = {path: leaves[path].shape[dim] for path, dim in dims.items()}
    voters = [path for path in dims if path in explicit] or list(dims)
    votes = Counter(sizes[path] for path in voters)
    size = votes.most_common(1)[0][0]
    if explicit and len(votes) > 1:
        raise SampleError(
            f"batch_dims gives different batch sizes, {sorted(votes)}: the sample's tensors "
            f"are {_shapes(leaves)}"
        )
    if size == 0:
        raise SampleError(
            f"the sample's batch is empty ({_shapes(leaves)}): pass a batch of one or more samples"
        )
    return {path: dim for path, dim in dims.items() if sizes[path] == size}, size


def _named_dim(
    path: Path, named: Mapping[str | int, int | None], default: int | None
) -> int | None:
    for key, dim in named.items():
        if _covers(key, path):
            return dim
    return default


def _covers(key: str | int, path: Path) -> bool:
    """Say whether a key of `batch_dims` is the path of a tensor, or either end of it."""
    parts = tuple(str(key).split("."))
    return path[: len(parts)] == parts or path[-len(parts) :] == parts


def _dotted(path: Path) -> str:
    return ".".join(path) or "the sample"


def _shapes(leaves: Mapping[Path, Tensor]) -> str:
    shown = [f"{_dotted(path)} {tuple(leaf.shape)}" for path, leaf in leaves.items()]
    more = f" and {len(shown) - 8} more" if len(shown) > 8 else ""
    return (", ".join(shown[:8]) + more) or "no tensors"


def _is_per_sample(leaf: Any, size: int) -> bool:
    """Say whether a leaf holds one Python object per sample; (224, 224) is no batch of two."""
    if isinstance(leaf, tuple):
        return len(leaf) == size and all(isinstance(item, (str, bytes)) for item in leaf)
    return isinstance(leaf, list) and len(leaf) == size


def _on_cpu(_: Path, leaf: Any) -> Any:
    """Bring a tensor to the CPU; one on `meta` has no values, so zeros stand in for them."""
    if not isinstance(leaf, Tensor):
        return leaf
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


def _draw(sample: Any) -> Any:
    """Return one batch: the sample itself, or one made from a data set or loader."""
    if isinstance(sample, DataLoader):
        collate = sample.collate_fn
        batched = sample.batch_sampler is not None or sample.batch_size is not None
        return _collated(sample.dataset, collate, batched=batched)
    if _is_dataset(sample):
        return _collated(sample, default_collate, batched=True)
    if isinstance(sample, Iterator):
        raise SampleError(
            f"a {type(sample).__name__} would lose a batch by being read: pass the DataLoader "
            "itself, or one batch"
        )
    if not _is_structure(sample) and hasattr(sample, "__iter__"):
        with _random_state_kept():
            return next(iter(sample))
    return sample


def _is_dataset(sample: Any) -> bool:
    """Say whether a sample is a data set, in PyTorch's sense or by having a length and items."""
    if isinstance(sample, Dataset):
        return True
    has_items = hasattr(sample, "__len__") and hasattr(sample, "__getitem__")
    return has_items and not _is_structure(sample)


def _is_structure(sample: Any) -> bool:
    """Say whether a sample is a container of tensors, whose items are parts and not samples."""
    known = isinstance(sample, (Tensor, Mapping, Sequence)) or type(sample) in SUPPORTED_NODES
    return known or dataclasses.is_dataclass(sample)


def _collated(dataset: Any, collate: Callable[[Any], Any], *, batched: bool) -> Any:
    """Collate copies of the largest of some items, or take that item where it is a batch."""
    with _random_state_kept():
        try:
            item = max(_some_items(dataset), key=_size_bytes, default=None)
            if item is None:
                raise SampleError("the data set is empty: pass one batch, or a data set with items")
            return collate([item] * ITEMS_COLLATED if batched else item)
        except SampleError:
            raise
        except Exception as error:
            raise SampleError(
                f"no batch can be made from the data set ({type(error).__name__}: {error}): pass "
                "a DataLoader with the collate_fn that it needs, or one batch"
            ) from error


def _some_items(dataset: Any) -> Iterator[Any]:
    """Yield evenly spaced items until enough were seen or enough time has passed."""
    if isinstance(dataset, IterableDataset):
        items: Iterable[Any] = islice(dataset, ITEMS_SEEN)
    else:
        length = len(dataset)
        count = min(length, ITEMS_SEEN)
        items = (dataset[i * (length - 1) // max(count - 1, 1)] for i in range(count))
    started = time.monotonic()
    for item in items:
        yield item
        if time.monotonic() - started > SECONDS_LOOKING:
            return


def _size_bytes(item: Any) -> int:
    """Return the bytes of an item's tensors and arrays, and the lengths of its lists and texts."""
    return sum(
        len(leaf) if isinstance(leaf, (str, bytes, list, tuple)) else getattr(leaf, "nbytes", 0)
        for _, leaf in _leaves(item)
    )


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """Leave the global generators of torch, Python and NumPy as they were."""
    numpy = sys.modules.get("numpy")
    python_state = random.getstate()
    numpy_state = numpy.random.get_state() if numpy else None
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(python_state)
            if numpy:
                numpy.random.set_state(numpy_state)


def _leaves(node: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    parts = _parts(node)
    if parts is None:
        yield path, node
    else:
        for key, part in parts:
            yield from _leaves(part, (*path, key))


def _map(visit: Callable[[Path, Any], Any], node: Any, path: Path = ()) -> Any:
    """Return the same structure with every leaf replaced by `visit(path, leaf)`."""
    parts = _parts(node)
    if parts is None:
        return visit(path, node)
    return _with_parts(node, [_map(visit, part, (*path, key)) for key, part in parts])


def _parts(node: Any) -> list[tuple[str, Any]] | None:
    """Return the named parts of a container that may hold tensors; None for a leaf."""
    if isinstance(node, PackedSequence):
        raise SampleError(
            "a PackedSequence cannot be resized: pass the padded tensor and the lengths, or a "
            "Workload with its own batch function"
        )
    if isinstance(node, (Tensor, nn.Module, str, bytes)):
        return None
    if isinstance(node, Mapping):
        return [(str(key), node[key]) for key in node]
    if isinstance(node, (list, tuple)):
        if not any(_holds_tensor(part) for part in node):
            return None
        names = getattr(node, "_fields", range(len(node)))
        return [(str(name), part) for name, part in zip(names, node, strict=True)]
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        return [(f.name, getattr(node, f.name)) for f in dataclasses.fields(node) if f.init]
    if type(node) in SUPPORTED_NODES:
        parts, _ = SUPPORTED_NODES[type(node)].flatten_fn(node)
        return [(str(index), part) for index, part in enumerate(parts)]
    attributes = getattr(node, "__dict__", None)
    if attributes and any(isinstance(value, Tensor) for value in attributes.values()):
        return list(attributes.items())
    return None


def _holds_tensor(node: Any) -> bool:
    return any(isinstance(leaf, Tensor) for _, leaf in _leaves(node))


def _with_parts(node: T, parts: list[Any]) -> T:
    """Return a copy of a container with its parts, in the order of `_parts`, replaced."""
    result: Any
    if isinstance(node, Mapping):
        # Copied, not constructed: BatchEncoding and ModelOutput carry more than their items.
        result = copy.copy(node)
        for key, part in zip(node, parts, strict=True):
            result[key] = part
    elif isinstance(node, tuple) and hasattr(node, "_fields"):
        result = type(node)(*parts)
    elif isinstance(node, (list, tuple)):
        result = type(node)(parts)
    elif dataclasses.is_dataclass(node):
        names = [f.name for f in dataclasses.fields(node) if f.init]
        result = dataclasses.replace(node, **dict(zip(names, parts, strict=True)))  # type: ignore[type-var]
    elif type(node) in SUPPORTED_NODES:
        definition = SUPPORTED_NODES[type(node)]
        result = definition.unflatten_fn(parts, definition.flatten_fn(node)[1])
    else:
        result = copy.copy(node)
        vars(result).update(zip(vars(node), parts, strict=True))
    return result  # type: ignore[no-any-return]
