"""Whether the user's model, loss and optimizer are as before, once code of a user has run.

Compared are attributes, what containers hold, and what tensors are: nothing is executed or copied.
Values that are written through `Tensor.data` are not seen.

Invariant: what is found changed is put back, but for the values of tensors, which are not kept.
"""

from __future__ import annotations

import types
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["State"]

_PLAIN = (bool, int, float, complex, str, bytes)
_NO_STATE = (*_PLAIN, type, types.FunctionType, types.MethodType, types.ModuleType)

_REGISTRIES = ("_parameters", "_buffers", "_modules")
"""Attributes of a module whose entries have names of their own."""


class State:
    """Objects of the user as they are now.

    >>> layer = nn.Linear(1, 1)
    >>> state = State(model=layer)
    >>> _ = layer.weight.requires_grad_(False)
    >>> state.changes()
    ['model.weight.requires_grad']
    >>> state.put_back()
    >>> state.changes(), layer.weight.requires_grad
    ([], True)
    """

    def __init__(self, **objects: Any) -> None:
        """Look at objects by their names, at what they hold, and at attributes of what that is."""
        self._parts: dict[int, _Attributes | _Container | _TensorPart] = {}
        waiting = [(name, value, False) for name, value in reversed(objects.items())]
        while waiting:
            path, value, is_inside = waiting.pop()
            if value is None or isinstance(value, _NO_STATE) or id(value) in self._parts:
                continue
            held: list[tuple[str, Any]] = []
            is_owner = isinstance(value, (nn.Module, torch.optim.Optimizer))
            if isinstance(value, Tensor):
                tensor = _TensorPart(path, value)
                self._parts[id(value)] = tensor
                facts = zip(_FACTS, tensor.before, strict=True)
                held = [(f"{path}.{name}", each) for name, each in facts if name in _OBJECTS]
            elif isinstance(value, tuple):
                held = [(f"{path}[{at}]", each) for at, each in enumerate(value)]
            elif isinstance(value, (dict, list, set, deque)):
                container = _Container(path, value)
                self._parts[id(value)] = container
                held = [*container.named()] if container.values else []
            elif isinstance(getattr(value, "__dict__", None), dict) and (
                is_owner or not is_inside  # not all that a trainer reaches
            ):
                owner = _Attributes(path, value)
                self._parts[id(value)] = owner
                held, is_inside = [*owner.named()], not is_owner
            waiting += [(name, each, is_inside) for name, each in reversed(held)]

    def changes(self) -> list[str]:
        """Return the names of what is not as it was."""
        return list(dict.fromkeys(name for part in self._parts.values() for name in part.changes()))

    def put_back(self) -> None:
        """Let everything be as it was, as far as that can be had."""
        for part in self._parts.values():
            if [*part.changes()]:
                with suppress(Exception):  # it is among the changes still
                    part.put_back()


class _Container:
    """What a dict, list, set or deque holds."""

    def __init__(self, path: str, container: Any) -> None:
        self.path = path
        self.container = container
        self.keys, self.values = self._held()

    def _held(self) -> tuple[list[Any], list[Any]]:
        """Return the keys of a dict, which others lack, and the values."""
        held = self.container
        return (list(held), list(held.values())) if isinstance(held, dict) else ([], list(held))

    def named(self) -> Iterator[tuple[str, Any]]:
        """Yield what it holds, by name."""
        names = self.keys or range(len(self.values))
        return ((_joined(self.path, key), at) for key, at in zip(names, self.values, strict=True))

    def changes(self) -> Iterable[str]:
        """Return the names of entries that are others; the container's, where their order is."""
        keys, values = self._held()
        is_alike = keys == self.keys and len(values) == len(self.values)
        if is_alike and (
            all(map(is_, values, self.values)) or all(map(_same, values, self.values))
        ):
            return ()
        if not isinstance(self.container, dict):
            return (self.path,)
        known = dict(zip(self.keys, self.values, strict=True))
        now = dict(zip(keys, values, strict=True))
        different = [
            _joined(self.path, key)
            for key in {**known, **now}
            if key not in known or key not in now or not _same(known[key], now[key])
        ]
        return different or (f"the order of {self.path}",)

    def put_back(self) -> None:
        """Let it hold what it held, in the same order."""
        held = self.container
        held.clear()
        if isinstance(held, dict):
            held.update(zip(self.keys, self.values, strict=True))
        elif isinstance(held, set):
            held.update(self.values)
        else:
            held.extend(self.values)


class _Attributes(_Container):
    """The class of an object, and its attributes; of an optimizer, its groups alone."""

    def __init__(self, path: str, owner: Any) -> None:
        self.owner = owner
        self.kind = type(owner)
        super().__init__(path, vars(owner))

    def _held(self) -> tuple[list[Any], list[Any]]:
        if isinstance(self.owner, torch.optim.Optimizer):
            # its state grows where somebody looks at it
            return ["param_groups"], [self.owner.param_groups]
        return super()._held()

    def named(self) -> Iterator[tuple[str, Any]]:
        """Yield the attributes, by name; those that a module registers by its own."""
        is_module = isinstance(self.owner, nn.Module)
        for key, value in zip(self.keys, self.values, strict=True):
            is_registry = is_module and key in _REGISTRIES
            yield self.path if is_registry else _joined(self.path, key), value

    def changes(self) -> Iterable[str]:
        """Return what of it is different."""
        changed = super().changes()
        if type(self.owner) is self.kind:
            return changed
        return (f"{self.path}.__class__", *changed)

    def put_back(self) -> None:
        """Let it have the class and the attributes that it had."""
        if type(self.owner) is not self.kind:
            self.owner.__class__ = self.kind
        if isinstance(self.owner, torch.optim.Optimizer):
            self.owner.param_groups = self.values[0]
        else:
            super().put_back()


class _TensorPart:
    """What a tensor is, and which memory it has."""

    def __init__(self, path: str, tensor: Tensor) -> None:
        self.path = path
        self.tensor = tensor
        self.before = _facts(tensor)
        self._memory = _read(tensor, "data")  # keeps the memory alive, so that no other is there

    def changes(self) -> Iterable[str]:
        """Return what of it is different."""
        return [
            f"{self.path}.{name}"
            for name, was, now in zip(_FACTS, self.before, _facts(self.tensor), strict=True)
            if not (was is now or (name not in _OBJECTS and was == now))
        ]

    def put_back(self) -> None:
        """Let it have the memory, the gradient and the hooks that it had, and need a gradient."""
        tensor: Any = self.tensor
        before = dict(zip(_FACTS, self.before, strict=True))
        now = dict(zip(_FACTS, _facts(tensor), strict=True))
        if any(now[name] != before[name] for name in _OF_MEMORY):
            tensor.data = self._memory
        for name in ("requires_grad", *_OBJECTS):
            if now[name] is not before[name]:
                setattr(tensor, name, before[name])
        if type(tensor) is not before["__class__"]:
            tensor.__class__ = before["__class__"]


_OBJECTS = ("grad", "_backward_hooks", "_post_accumulate_grad_hooks")
_OF_MEMORY = ("dtype", "shape", "stride", "memory")
_FACTS = ("__class__", "requires_grad", *_OBJECTS, *_OF_MEMORY, "values")


def _facts(tensor: Tensor) -> tuple[Any, ...]:
    """Return what `_FACTS` names; None for what a kind of tensors has not."""
    stride = memory = grad = None
    if _read(tensor, "is_leaf"):
        grad = _read(tensor, "grad")
    with suppress(Exception):  # uninitialized, sparse, or without memory of its own
        stride, memory = tensor.stride(), tensor.untyped_storage()._cdata
    return (
        type(tensor),
        tensor.requires_grad,
        grad,
        tensor._backward_hooks,
        _read(tensor, "_post_accumulate_grad_hooks"),
        tensor.dtype,
        _read(tensor, "shape"),
        stride,
        memory,
        _read(tensor, "_version"),
    )


def _read(tensor: Tensor, name: str) -> Any:
    """Return an attribute of a tensor; None where its kind has none."""
    try:
        return getattr(tensor, name)
    except Exception:  # uninitialized, or made for inference
        return None


def _joined(path: str, key: object) -> str:
    return f"{path}.{key}" if isinstance(key, str) else f"{path}[{key!r}]"


def _same(was: Any, now: Any) -> bool:
    """Return whether two values are one object, or plain and equal."""
    if was is now:
        return True
    if type(was) is not type(now):
        return False
    if isinstance(was, tuple):
        return len(was) == len(now) and all(map(_same, was, now))
    return isinstance(was, _PLAIN) and bool(was == now)
