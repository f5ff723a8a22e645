"""Containers of tensors: what counts as one, how it is walked, and how it is rebuilt.

Invariant: the table `KINDS` alone says what a container is, so samples, items of data sets,
micro-batches on their way to a device and outputs of models are taken apart by the same rules.
Nothing that is walked is changed: a container with other parts is a new object of its class.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from autobatch.support.torch_private import SUPPORTED_NODES

__all__ = [
    "Path",
    "Shape",
    "holds_tensor",
    "is_array",
    "is_structure",
    "leaves",
    "map_leaves",
    "map_tensors",
    "sized_leaves",
    "tensors",
    "with_tensors",
]

Path: TypeAlias = tuple[str, ...]
Shape: TypeAlias = tuple[int, ...]
Parts: TypeAlias = list[tuple[str, Any]]

_LEAVES = (Tensor, nn.Module, str, bytes, type, int, float, complex, type(None))
_NUMBERS = frozenset({int, float, bool, complex, type(None)})


class Kind(NamedTuple):
    """One kind of container: which values it covers, their named parts, a copy with other parts."""

    covers: Callable[[Any], bool]
    parts: Callable[[Any], Parts]
    rebuilt: Callable[[Any, list[Any]], Any]


def is_array(leaf: Any) -> bool:
    """Say whether a value is a tensor or an array of NumPy's."""
    if isinstance(leaf, Tensor):
        return True
    return hasattr(type(leaf), "__array_interface__") and hasattr(leaf, "shape")  # no PIL image


def _packed_parts(node: PackedSequence) -> Parts:
    names = ("data", "sorted_indices", "unsorted_indices")  # the batch sizes stay on the CPU
    return [(name, getattr(node, name)) for name in names]


def _rebuilt_packed(node: PackedSequence, parts: list[Any]) -> PackedSequence:
    return type(node)(parts[0], node.batch_sizes, *parts[1:])


def _is_sequence(node: Any) -> bool:
    """Say whether a value is a list or tuple; one without any tensor is a value of its own."""
    if not isinstance(node, (list, tuple)):
        return False
    return not _NUMBERS.issuperset(map(type, node)) and any(map(holds_tensor, node))


def _items(node: Any) -> Parts:
    names = getattr(node, "_fields", range(len(node)))
    return [(str(name), part) for name, part in zip(names, node, strict=True)]


def _rebuilt_sequence(node: Any, parts: list[Any]) -> Any:
    return type(node)(*parts) if hasattr(node, "_fields") else type(node)(parts)


def _rebuilt_mapping(node: Mapping[Any, Any], parts: list[Any]) -> Any:
    items = dict(zip(node, parts, strict=True))
    if not isinstance(node, MutableMapping):
        return type(node)(items)  # type: ignore[call-arg]
    result = copy.copy(node)  # not constructed: BatchEncoding and ModelOutput hold more than items
    for key, part in items.items():
        result[key] = part
    return result


def _is_registered(node: Any) -> bool:
    """Say whether PyTorch's pytree alone knows how a value is taken apart."""
    has_names = isinstance(node, (dict, list, tuple)) or dataclasses.is_dataclass(node)
    return type(node) in SUPPORTED_NODES and not has_names


def _registered_parts(node: Any) -> Parts:
    parts, _ = SUPPORTED_NODES[type(node)].flatten_fn(node)
    keys = list(node) if isinstance(node, Mapping) else []
    names = keys if len(keys) == len(parts) else range(len(parts))
    return [(str(name), part) for name, part in zip(names, parts, strict=True)]


def _rebuilt_registered(node: Any, parts: list[Any]) -> Any:
    definition = SUPPORTED_NODES[type(node)]
    return definition.unflatten_fn(parts, definition.flatten_fn(node)[1])


def _has_keys(node: Any) -> bool:
    """Say whether an object gives its parts by key as a mapping does, and moves (graphs do)."""
    is_mapping = isinstance(node, (Mapping, type))
    names = ("keys", "to", "__getitem__", "__setitem__")
    return not is_mapping and all(callable(getattr(node, name, None)) for name in names)


def _rebuilt_keyed(node: Any, parts: list[Any]) -> Any:
    result = copy.copy(node)
    for key, part in zip(node.keys(), parts, strict=True):
        result[key] = part
    return result


def _is_record(node: Any) -> bool:
    """Say whether a value is a dataclass, or an object one of whose attributes is a tensor.

    An object that can be moved may hold its tensors deeper, as boxes of detectors do.
    """
    if dataclasses.is_dataclass(node):
        return True
    values = getattr(node, "__dict__", {}).values()
    if any(is_array(value) for value in values):
        return True
    moves = callable(getattr(node, "to", None)) and not isinstance(node, type)
    return moves and any(holds_tensor(value) for value in values)


def _attributes(node: Any) -> Parts:
    if not dataclasses.is_dataclass(node):
        return list(vars(node).items())
    names = (field.name for field in dataclasses.fields(node))
    return [(name, getattr(node, name)) for name in names if hasattr(node, name)]


def _is_settled(node: Any) -> bool:
    """Whether constructing a dataclass from its own fields gives the same fields.

    One that normalises or pads in `__post_init__` would do so twice.
    """
    if not hasattr(type(node), "__post_init__"):
        return True
    try:
        before, after = (dict(_attributes(one)) for one in (node, dataclasses.replace(node)))
        return all(
            torch.equal(value, after[name])
            for name, value in before.items()
            if isinstance(value, Tensor) and value is not after[name]
        )
    except Exception:  # made from other things than its fields, or its values are not known
        return True


def _rebuilt_record(node: Any, parts: list[Any]) -> Any:
    values = dict(zip((name for name, _ in _attributes(node)), parts, strict=True))
    try:
        if not _is_settled(node):
            raise ValueError("its fields are what was made of those that it was given")
        taken = {field.name for field in dataclasses.fields(node) if field.init}
        # Constructed, so that what `__post_init__` derives follows the new parts.
        result = dataclasses.replace(node, **{n: v for n, v in values.items() if n in taken})
        rest = {n: v for n, v in values.items() if n not in taken and holds_tensor(v)}
    except (TypeError, ValueError):  # no dataclass, or its fields are not what it is made from
        result, rest = copy.copy(node), values
    for name, value in rest.items():
        object.__setattr__(result, name, value)  # it may be frozen
    return result


KINDS = (
    Kind(lambda node: isinstance(node, PackedSequence), _packed_parts, _rebuilt_packed),
    Kind(_is_sequence, _items, _rebuilt_sequence),
    Kind(_is_registered, _registered_parts, _rebuilt_registered),
    Kind(
        lambda node: isinstance(node, Mapping),
        lambda node: [(str(key), node[key]) for key in node],
        _rebuilt_mapping,
    ),
    Kind(
        _has_keys,
        lambda node: [(str(key), node[key]) for key in node.keys()],  # noqa: SIM118
        _rebuilt_keyed,
    ),
    Kind(_is_record, _attributes, _rebuilt_record),
)
"""Every kind of container; of several that cover a value, the first one holds."""


def _kind_of(node: Any) -> Kind | None:
    if isinstance(node, _LEAVES) or is_array(node):
        return None
    return next((kind for kind in KINDS if kind.covers(node)), None)


def holds_tensor(node: Any) -> bool:
    """Say whether there is a tensor or an array in a value."""
    return any(is_array(leaf) for _, leaf in leaves(node))


def is_structure(node: Any) -> bool:
    """Say whether the class of a value, whatever it holds, is that of a batch and not a data set.

    The items of a batch are its parts; those of a data set are its samples.
    """
    is_named = isinstance(node, (Tensor, Mapping, Sequence)) or dataclasses.is_dataclass(node)
    moves = callable(getattr(node, "to", None))  # graphs and TensorDicts also have a length
    return is_named or moves or is_array(node) or _is_registered(node)


def _nowhere(_path: Path, _node: Any) -> bool:
    return False


def leaves(
    node: Any, path: Path = (), *, stop: Callable[[Path, Any], bool] = _nowhere
) -> Iterator[tuple[Path, Any]]:
    """Yield everything that is no container, with the names that lead to it.

    Args:
        node: a container or a leaf.
        path: the names that lead to `node`.
        stop: says of a container, by its path too, that it is to be taken as a leaf.

    >>> list(leaves({"x": (Tensor(), 5)}))
    [(('x', '0'), tensor([])), (('x', '1'), 5)]
    """
    kind = None if stop(path, node) else _kind_of(node)
    if kind is None:
        yield path, node
    else:
        for name, part in kind.parts(node):
            yield from leaves(part, (*path, name), stop=stop)


def map_leaves(
    visit: Callable[[Path, Any], Any],
    node: Any,
    path: Path = (),
    *,
    stop: Callable[[Path, Any], bool] = _nowhere,
) -> Any:
    """Return the same structure with every leaf replaced by `visit(path, leaf)`.

    Takes the arguments of `leaves`.
    """
    kind = None if stop(path, node) else _kind_of(node)
    if kind is None:
        return visit(path, node)
    parts = kind.parts(node)
    return kind.rebuilt(
        node, [map_leaves(visit, part, (*path, name), stop=stop) for name, part in parts]
    )


def tensors(node: Any) -> Iterator[Tensor]:
    """Yield all tensors, in the order of the containers."""
    return (leaf for _, leaf in leaves(node) if isinstance(leaf, Tensor))


def map_tensors(change: Callable[[Tensor], Tensor], node: Any) -> Any:
    """Return the same structure with every tensor changed.

    >>> import torch
    >>> map_tensors(torch.Tensor.double, {"x": torch.ones(2), "n": 3})
    {'x': tensor([1., 1.], dtype=torch.float64), 'n': 3}
    """
    return map_leaves(lambda _, leaf: change(leaf) if isinstance(leaf, Tensor) else leaf, node)


def with_tensors(node: Any, others: Iterable[Tensor]) -> Any:
    """Return the same structure with other tensors, in the order of `tensors`."""
    following = iter(others)
    return map_tensors(lambda _: next(following), node)


def sized_leaves(item: Any, path: Path = ()) -> Iterator[tuple[Path, Shape, int]]:
    """Yield path, shape and size of an item's tensors, arrays, images, texts and lists.

    The items of a data set are not collated yet: a list inside one, of tokens or of boxes, is a
    leaf whose length varies from item to item. A size is in bytes; that of a text or a list of
    numbers is its length.
    """
    if isinstance(item, (list, tuple)):
        # One glance at the types: a text has hundreds of tokens, and a data set many texts.
        if _NUMBERS.issuperset(map(type, item)):
            yield path, (len(item),), len(item)
            return
        if isinstance(item, list) and path:
            inner = sum(size for part in item for _, _, size in sized_leaves(part))
            yield path, (len(item),), len(item) + inner
            return
        parts = _items(item)
    else:
        measured = None if isinstance(item, Mapping) else _measured(item)
        if measured is not None:
            yield path, *measured
            return
        kind = _kind_of(item)
        parts = [] if kind is None else kind.parts(item)
    for name, part in parts:
        yield from sized_leaves(part, (*path, name))


def _measured(leaf: Any) -> tuple[Shape, int] | None:
    """Return shape and size of a leaf; None where it has none."""
    if isinstance(leaf, (str, bytes)):
        return (len(leaf),), len(leaf)
    if isinstance(leaf, Tensor):  # sparse ones have no nbytes
        return tuple(leaf.shape), leaf.numel() * leaf.element_size()
    if hasattr(leaf, "nbytes"):
        return tuple(getattr(leaf, "shape", ())), int(leaf.nbytes)
    if hasattr(leaf, "getbands"):  # a PIL image
        return (leaf.height, leaf.width), leaf.height * leaf.width * len(leaf.getbands())
    return None
