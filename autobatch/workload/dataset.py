"""The largest batch that a data set or loader can give, found by looking through its items.

Invariant: a PyTorch loader's iterators, workers and samplers are not touched; the global random
state and what is small of the state of data set and collate function are afterwards as before.
"""

from __future__ import annotations

import copy
import functools
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from types import FunctionType, MethodType
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, default_collate

from autobatch.errors import SampleError
from autobatch.support.randomness import random_state_kept
from autobatch.support.wording import for_reader, listed, one_line
from autobatch.workload.kept import Kept, attributes_kept
from autobatch.workload.tree import (
    Path,
    Shape,
    is_array,
    is_structure,
    map_leaves,
    sized_leaves,
)

__all__ = ["Drawn", "dataset_length", "draw"]

SECONDS_LOOKING = 10.0
# Once all items so far are of one size, the others are unlikely to be worth a longer wait.
SECONDS_ALIKE = 2.0
# Items read of a stream, which may have no end; and once all of them are alike.
ITEMS_STREAMED = 4096
ITEMS_ALIKE = 512
# Batches of items that are largest in another way, of which each is run.
RIVALS = 3
# Items per collated batch. Even, as mixup pairs samples; 6 is rarely another dimension's size.
ITEMS_COLLATED = 6
# Dimensions whose longest item is kept: items that each have keys of their own may name any number.
EXTENTS_COMPARED = 32
# Items of other sizes that are kept, for what a stream of them reserves.
SPREAD = 8
# Leaves and items that a note names.
NAMES_SHOWN = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """One batch, and where it comes from.

    Attributes:
        batch: the sample itself, or a batch of the largest items of a data set.
        notes: which items these are, in one sentence; none where all that were seen are alike.
        limit: samples in an epoch, the most that a micro-batch can have; None where unknown.
        samples: how many samples were collated to `batch`; 0 where it came as it is.
        other: a batch of another number of them by the same function, and that number.
        rivals: batches of items that are largest in another way, and may take more memory.
        stream: batches of other shapes that the data set gives, smallest first, then this one.
    """

    batch: Any
    notes: tuple[str, ...] = ()
    limit: int | None = None
    samples: int = 0
    other: tuple[Any, int] | None = None
    rivals: tuple[Drawn, ...] = ()
    stream: tuple[Drawn, ...] = ()


def draw(sample: Any) -> Drawn:
    """Return one batch: the sample itself, or the largest that a data set or loader can give.

    All items are looked at where SECONDS_LOOKING are enough, else evenly spread ones; of a stream,
    the first ones. The item with most bytes is collated with those that are longer in some
    dimension, because a collate function pads each field to its own longest. Where no item is
    longer, or the collate function does not pad, it is collated with copies of itself. Of a data
    set that gives whole batches, the one with most bytes per row is taken.

    Raises:
        SampleError: an item cannot be read, or the items cannot be collated.

    >>> class Texts(Dataset):
    ...     def __len__(self): return 9
    ...     def __getitem__(self, index): return torch.zeros(index % 7)
    >>> drawn = draw(Texts())
    >>> drawn.batch.shape[1], drawn.limit
    (6, 9)
    >>> drawn.notes
    ("the probe's batches repeat dataset[6], the largest of all 9 items (6)",)
    """
    if isinstance(sample, (FunctionType, MethodType, functools.partial)):
        raise SampleError(
            "sample is a function: pass one batch, or a function of n that makes a batch of n "
            "samples as autobatch.Workload(model=…, batch=…)"
        )
    if isinstance(sample, DataLoader):
        dataset = sample.dataset
        batched = sample.batch_sampler is not None or sample.batch_size is not None
        if not batched and isinstance(sample.sampler, BatchSampler):
            dataset = _ReadByLists(dataset)
        drawn = _worst(dataset, sample.collate_fn, batched=batched)
    elif _is_dataset(sample):
        drawn = _worst(sample, default_collate, batched=True)
    elif isinstance(sample, Iterator):
        raise SampleError(
            f"a {type(sample).__name__} would lose a batch by being read: pass the DataLoader "
            "itself, or one batch"
        )
    elif not is_structure(sample) and hasattr(sample, "__iter__"):
        drawn = _worst(sample, lambda batch: batch, batched=False)
    else:
        drawn = Drawn(batch=sample)
    return replace(drawn, limit=dataset_length(sample))


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


def _is_dataset(sample: Any) -> bool:
    """Say whether a sample is a PyTorch Dataset, or has a length and items as one has."""
    if isinstance(sample, Dataset):
        return True
    has_items = hasattr(sample, "__len__") and hasattr(sample, "__getitem__")
    return has_items and not is_structure(sample)


class _ReadByLists(Dataset[Any]):
    """A data set that a BatchSampler indexes with lists: each item is a batch of one index."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[[index] * ITEMS_COLLATED]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Item:
    """An item, its size in bytes, and the shape of each of its leaves.

    Where the items are whole batches, the size is that of a row.
    """

    name: str
    value: Any
    size: int
    shapes: Mapping[Path, Shape]

    def extent(self, path: Path, dim: int) -> int:
        shape = self.shapes.get(path, ())
        return shape[dim] if dim < len(shape) else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Look:
    """What was found: the largest item, and those that are longer in a dimension of a leaf.

    `alike` says that all items seen have one size, `extent` how many items were seen; `spread` are
    items of other sizes, smallest first.
    """

    first: _Item
    largest: _Item
    longer: tuple[tuple[Path, _Item], ...]
    spread: tuple[_Item, ...]
    alike: bool
    complete: bool
    extent: str


def _worst(dataset: Any, collate: Callable[[Any], Any], *, batched: bool) -> Drawn:
    """Return a batch of the largest items, with notes where they differ or something was lost."""
    with random_state_kept(), attributes_kept(dataset, collate) as kept:
        drawn = _largest(dataset, collate, kept, batched=batched)
    return _noted(drawn, kept.lost)


def _noted(drawn: Drawn, lost: Sequence[str]) -> Drawn:
    """Add notes to a batch, and to each that may be planned in its place."""
    rivals = tuple(_noted(each, lost) for each in drawn.rivals)
    return replace(drawn, notes=(*drawn.notes, *lost), rivals=rivals)


def _largest(dataset: Any, collate: Callable[[Any], Any], kept: Kept, *, batched: bool) -> Drawn:
    try:
        look = _look(dataset, kept, batched=batched)
        drawn, used = _collated(look, collate, batched=batched)
    except SampleError:
        raise
    except Exception as error:
        raise SampleError(
            f"no batch can be made from the data set ({one_line(error)}): pass "
            "a DataLoader with the collate_fn that it needs, or one batch"
        ) from error
    if look.alike:
        return drawn
    rivals = _rivals(drawn, look, collate) if batched else ()
    stream = tuple(_stream(drawn, look, collate, batched=batched))
    note = _note(look, used, batched=batched)
    return replace(drawn, notes=(note,), rivals=rivals, stream=stream)


def _rivals(drawn: Drawn, look: _Look, collate: Callable[[Any], Any]) -> tuple[Drawn, ...]:
    """Return batches of one item each that a batch does not exceed in every dimension."""
    known = [drawn]
    for item in (look.largest, *(item for _, item in look.longer)):
        with suppress(Exception):
            other = _twice(collate, [item.value] * ITEMS_COLLATED)
            if not any(_covers(each, other) for each in known):
                name = f"the micro-batches of the plan repeat {item.name}"
                known.append(replace(other, notes=(f"{name}, which takes the most memory",)))
    return tuple(known[1 : 1 + RIVALS])


def _covers(larger: Drawn, smaller: Drawn) -> bool:
    """Say whether no dimension of a batch is longer than that of another, in any of its leaves."""
    one, other = dict(_shapes(larger)), dict(_shapes(smaller))
    return one.keys() >= other.keys() and all(
        len(one[path]) == len(shape) and all(a >= b for a, b in zip(one[path], shape, strict=True))
        for path, shape in other.items()
    )


def _stream(
    drawn: Drawn, look: _Look, collate: Callable[[Any], Any], *, batched: bool
) -> Iterator[Drawn]:
    """Yield batches of items of other sizes, smallest first, and the drawn one last."""
    seen = [_shapes(drawn)]
    others = []
    for item in look.spread:
        with suppress(Exception):  # a function that drops short items may have none left
            other, _ = _collated(replace(look, largest=item, longer=()), collate, batched=batched)
            if _shapes(other) not in seen:
                seen.append(_shapes(other))
                others.append(other)
    if others:
        yield from (*others, drawn)


def _shapes(drawn: Drawn) -> list[tuple[Path, Shape]]:
    return [(path, shape) for path, shape, _ in sized_leaves(drawn.batch)]


def _look(dataset: Any, kept: Kept, *, batched: bool) -> _Look:
    """Read items until there are no more, or enough time has passed."""
    is_stream = isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__")
    length = None if is_stream else _length(dataset)
    streamed = _stream_items(dataset, kept, batched)
    items = streamed if length is None else _map_items(dataset, length)
    largest: _Item | None = None
    longest: dict[tuple[Path, int], _Item] = {}
    first: _Item | None = None
    spread: list[_Item] = []
    alike, seen, seconds = True, 0, 0.0
    started = time.monotonic()
    for name, value in items:
        item = _measured(name, value, batched=batched)
        seen += 1
        kept.items = seen
        first = first or item
        largest = item if largest is None or item.size > largest.size else largest
        alike = alike and item.size == first.size
        _keep_spread(spread, item)
        if batched:
            alike = alike and item.shapes == first.shapes
            _keep_longest(longest, item)
        seconds = time.monotonic() - started
        is_enough = length is None and alike and seen == ITEMS_ALIKE
        if is_enough or seconds > (SECONDS_ALIKE if alike else SECONDS_LOOKING):
            complete = seen == length
            break
    else:
        complete = length is not None or seen < ITEMS_STREAMED
    if largest is None:
        raise SampleError("the data set is empty: pass one batch, or a data set with items")
    things = "items" if batched else "batches"
    if complete:
        extent = f"of all {seen:,} {things}"
    elif length is None:
        extent = f"of the first {seen:,} {things}"
    else:
        extent = f"of {seen:,} of the {length:,} {things}, looked at in {seconds:.1f} s"
    assert first is not None
    return _Look(
        first=first,
        largest=largest,
        longer=tuple(_longer(largest, longest)),
        spread=tuple(spread),
        alike=alike,
        complete=complete,
        extent=extent,
    )


def _map_items(dataset: Any, length: int) -> Iterator[tuple[str, Any]]:
    for index in _refining(length):
        name = f"dataset[{index}]"
        try:
            value = dataset[index]
        except Exception as error:
            raise _unreadable(name, error) from error
        yield name, value


def _refining(length: int) -> Iterator[int]:
    """Yield every index once: both ends, then passes that each halve the distance between indices.

    Within a pass the indices rise, which suits files that are read in order.
    """
    last = length - 1
    yield from (0, last)[:length]
    stride = 1 << last.bit_length()
    while stride > 1:
        stride //= 2
        yield from range(stride, last, 2 * stride)


def _stream_items(stream: Iterable[Any], kept: Kept, batched: bool) -> Iterator[tuple[str, Any]]:
    thing, count = "item" if batched else "batch", 0
    try:
        iterator = iter(stream)
        kept.require_new(iterator)
        for count, value in enumerate(islice(iterator, ITEMS_STREAMED), start=1):
            yield f"{thing} {count} of the stream", value
    except SampleError:
        raise
    except Exception as error:
        raise _unreadable(f"{thing} {count + 1} of the stream", error) from error


def _unreadable(name: str, error: Exception) -> SampleError:
    return SampleError(
        f"{name} cannot be read ({one_line(error)}): repair it or leave it out, or pass one batch"
    )


def _measured(name: str, value: Any, *, batched: bool) -> _Item:
    leaves = list(sized_leaves(value))
    shapes = {path: shape for path, shape, _ in leaves}
    size = sum(size for _, _, size in leaves)
    if not batched:
        # Per row, because a micro-batch repeats rows, however many the batch has.
        rows = Counter(shape[0] for shape in shapes.values() if shape).most_common(1)
        size //= max(rows[0][0], 1) if rows else 1
    return _Item(name=name, value=value, size=size, shapes=shapes)


def _keep_spread(spread: list[_Item], item: _Item) -> None:
    """Keep few items in the order of their sizes: of two that are close, the larger."""
    sizes = [known.size for known in spread]
    at = bisect_left(sizes, item.size)
    if any(known.shapes == item.shapes for known in spread):
        return
    spread.insert(at, item)
    if len(spread) > SPREAD:
        gaps = [b.size - a.size for a, b in pairwise(spread)]
        del spread[max(gaps.index(min(gaps)), 1)]


def _keep_longest(longest: dict[tuple[Path, int], _Item], item: _Item) -> None:
    """Keep an item for each dimension of a leaf in which it is longer than all before it."""
    for path, shape in item.shapes.items():
        for dim, extent in enumerate(shape):
            known = longest.get((path, dim))
            if known is None:
                if len(longest) < EXTENTS_COMPARED:
                    longest[path, dim] = item
            elif extent > known.extent(path, dim):
                longest[path, dim] = item


def _longer(
    largest: _Item, longest: Mapping[tuple[Path, int], _Item]
) -> Iterator[tuple[Path, _Item]]:
    """Yield the items that make a batch with the largest one as long in every dimension."""
    chosen = [largest]
    for (path, dim), item in longest.items():
        if all(item.extent(path, dim) > known.extent(path, dim) for known in chosen):
            chosen.append(item)
            yield path, item


def _collated(
    look: _Look, collate: Callable[[Any], Any], *, batched: bool
) -> tuple[Drawn, tuple[tuple[Path, _Item], ...]]:
    """Return a batch, and the items in it beside the largest."""
    if not batched:
        return Drawn(batch=_called(collate, look.largest.value)), ()
    if look.longer:
        items = [look.largest.value, *(item.value for _, item in look.longer)]
        count = max(ITEMS_COLLATED, len(items) + len(items) % 2)
        # A collate function that stacks without padding raises for items of different lengths.
        with suppress(Exception):
            return _twice(collate, [items[i % len(items)] for i in range(count)]), look.longer
    return _twice(collate, [look.largest.value] * ITEMS_COLLATED), ()


def _twice(collate: Callable[[Any], Any], items: list[Any]) -> Drawn:
    """Collate items, and all of them twice: the difference shows what belongs to a sample.

    Each time the function gets items of its own, as it may take them apart.
    """
    batch = _called(collate, copy.copy(items))
    other = None
    with suppress(Exception):
        other = _called(collate, [*items, *items]), 2 * len(items)
    return Drawn(batch=batch, samples=len(items), other=other)


def _called(collate: Callable[[Any], Any], items: Any) -> Any:
    """Collate items, which are afterwards as before, to a batch with memory of its own.

    One item may be there several times, and a function that takes dicts apart needs one each time.
    """

    def owned(_path: Path, leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            return leaf.detach().clone().requires_grad_(leaf.requires_grad)
        return leaf.copy() if is_array(leaf) and hasattr(leaf, "copy") else leaf

    if isinstance(items, list):
        items = [copy.copy(i) if isinstance(i, MutableMapping) else i for i in items]
    with attributes_kept([items], guarded=False):  # items that were read are ours to use up
        return map_leaves(owned, collate(items))


def _note(look: _Look, used: Sequence[tuple[Path, _Item]], *, batched: bool) -> str:
    """Say in one sentence which items a probe's batches are made of."""
    rows, largest = ("", "largest") if batched else ("the rows of ", "largest per row")
    note = f"the probe's batches repeat {rows}{look.largest.name}, the {largest} {look.extent}"
    shown = [_described(path, shape) for path, shape in look.largest.shapes.items() if shape]
    if shown:
        note += f" ({listed(shown, NAMES_SHOWN)})"
    if used:
        others = [f"{item.name} ({_described(path, item.shapes[path])})" for path, item in used]
        note += f", padded to what is longer in {listed(others, NAMES_SHOWN)}"
    if not look.complete:
        larger = for_reader(
            "pass a batch of it as sample=", "return a Workload whose batches have it"
        )
        note += f"; if you know a larger one, {larger}"
    return note


def _described(path: Path, shape: Shape) -> str:
    name = ".".join(path)
    extents = "×".join(f"{extent:,}" for extent in shape)
    return f"{f'[{name}]' if name.isdigit() else name} {extents}".strip()
