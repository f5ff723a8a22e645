"""What an update writes: parameters and whatever optimizers keep, so that it can be taken back.

Invariant: after `restore`, every tensor and every container that an optimizer reaches is as it was
when the record was made; where that cannot be promised, `changed` says so.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, MutableMapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from autobatch.accumulate.watch import versions
from autobatch.workload.optimizers import innermost, parameters_of
from autobatch.workload.tree import is_array

__all__ = ["Written"]

_DEEPEST = 8


class Written:
    """Optimizers before an update.

    Without copies, it is known whether PyTorch's own optimizers changed anything, by the versions
    of tensors. They go through the parameters of a group in order, those of one device and dtype
    together, so that nothing is written before something of the first of them is. Other optimizers
    may write in any order, and through pointers and `.data`, which versions do not show, so that
    nothing is known of them.

    Args:
        optimizers: all that the update steps.
        copied: copy everything to host memory, so that any update can be taken back.
    """

    def __init__(self, optimizers: Iterable[Any], *, copied: bool) -> None:
        self._optimizers = list(optimizers)
        self._inner = [innermost(optimizer) for optimizer in self._optimizers]
        self._is_known = all(map(_is_of_torch, self._inner))
        self._containers: list[tuple[Any, Any]] = []
        self._copies: list[tuple[Tensor, Tensor, Tensor]] | None = None
        self._kinds: list[tuple[Any, list[Tensor]]] = []
        if copied:
            reached = _Reached(self._optimizers)
            gradients = [p.grad for p in parameters_of(self._inner) if p.grad is not None]
            tensors = [*reached.tensors, *gradients]
            self._copies = [(t, t.detach(), t.detach().to("cpu", copy=True)) for t in tensors]
            self._containers = [(node, _shallow(node)) for node in reached.containers]
        elif self._is_known:
            states = [optimizer.state for optimizer in self._inner]
            nodes = [*states, *(entry for state in states for entry in state.values())]
            self._containers = [(node, _shallow(node)) for node in nodes]
            self._kinds = _kinds_of(self._inner)
        self._sizes = self._measured()
        self._watched = list(self._written_first())
        self._ids = list(map(id, self._watched))
        self._versions = versions(self._watched)

    def _written_first(self) -> Iterator[Tensor]:
        """Yield of each kind of parameters the first that is updated, and its state."""
        for state, parameters in self._kinds:
            first = next((p for p in parameters if p.grad is not None), None)
            if first is not None:
                yield first
                if first in state:
                    yield from filter(_is_tensor, state[first].values())

    def _measured(self) -> list[tuple[int, int]]:
        """Return what tells that containers have other parts than before."""
        groups = [group["params"] for o in self._inner for group in o.param_groups]
        states = [optimizer.state for optimizer in self._inner]
        return [(id(node), len(node)) for node in (*groups, *states)]

    def renewed(self) -> Written:
        """Return what is known before the next update; quickly, where only tensors changed."""
        if self._copies is not None or not self._is_known:
            return Written(self._optimizers, copied=False)
        watched = list(self._written_first())
        if self._sizes != self._measured() or list(map(id, watched)) != self._ids:
            return Written(self._optimizers, copied=False)
        self._versions = versions(watched)
        return self

    @property
    def changed(self) -> bool | None:
        """Whether the update changed a tensor; None where that is not known."""
        if not self._is_known:
            return None
        return versions(self._watched) != self._versions

    @property
    def can_restore(self) -> bool:
        """Whether `restore` puts everything back."""
        return self._copies is not None or self.changed is False

    def restore(self) -> None:
        """Put everything back."""
        for node, before in self._containers:
            _refill(node, before)
        with torch.no_grad():
            for tensor, alias, copy in self._copies or ():
                if type(tensor) in (Tensor, nn.Parameter) and _moved(tensor, alias):
                    tensor.data = alias
                tensor.copy_(copy)


def _kinds_of(optimizers: Iterable[Any]) -> list[tuple[Any, list[Tensor]]]:
    """Return the parameters of each group by device and dtype, with the state they are in."""
    kinds: dict[tuple[int, torch.device, torch.dtype], tuple[Any, list[Tensor]]] = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                key = (id(group), parameter.device, parameter.dtype)
                kinds.setdefault(key, (optimizer.state, []))[1].append(parameter)
    return list(kinds.values())


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _is_of_torch(optimizer: Any) -> bool:
    return f"{type(innermost(optimizer)).__module__}.".startswith("torch.optim.")


def _moved(tensor: Tensor, alias: Tensor) -> bool:
    return tensor.layout is torch.strided and tensor.data_ptr() != alias.data_ptr()


class _Reached:
    """The tensors and containers that optimizers reach, functions left out."""

    def __init__(self, optimizers: Iterable[Any]) -> None:
        self.tensors: list[Tensor] = []
        self.containers: list[Any] = []
        waiting = deque((optimizer.__dict__, 0) for optimizer in optimizers)
        seen: set[int] = set()
        while waiting:
            node, depth = waiting.popleft()
            if id(node) in seen or depth > _DEEPEST:
                continue
            seen.add(id(node))
            if isinstance(node, Tensor):
                self.tensors.append(node)
            elif isinstance(node, (MutableMapping, list, set, deque)):
                self.containers.append(node)
                waiting.extend((part, depth + 1) for part in _parts(node))
            elif isinstance(node, (tuple, frozenset)):
                waiting.extend((part, depth + 1) for part in node)
            elif is_array(node):
                self.containers.append(node)
            elif isinstance(node, nn.Module):
                waiting.append((node.__dict__, depth))
            elif _has_parts(node):
                waiting.append((getattr(node, "__dict__", None), depth + 1))
                if slots := _slots(node):
                    self.containers.append(node)
                    waiting.extend((getattr(node, name), depth + 1) for name in slots)


def _parts(node: Any) -> Iterator[Any]:
    return chain(node.keys(), node.values()) if isinstance(node, MutableMapping) else iter(node)


def _has_parts(node: Any) -> bool:
    has_some = hasattr(node, "__dict__") or bool(_slots(node))
    return has_some and not (isinstance(node, type) or callable(node))


def _slots(node: Any) -> list[str]:
    """Return the names of the slots of an object that hold something."""
    if type(node).__module__ == "builtins":
        return []
    names = (getattr(kind, "__slots__", ()) for kind in type(node).__mro__)
    flat = chain.from_iterable((each,) if isinstance(each, str) else each for each in names)
    return [n for n in flat if n not in ("__dict__", "__weakref__") and hasattr(node, n)]


def _shallow(node: Any) -> Any:
    if isinstance(node, MutableMapping):
        return dict(node)
    if is_array(node):
        return node.copy()
    if isinstance(node, (list, set, deque)):
        return list(node)
    return {name: getattr(node, name) for name in _slots(node)}


def _refill(node: Any, before: Any) -> None:
    """Let a container hold what it held before."""
    if isinstance(node, MutableMapping):
        for key in [key for key in node if key not in before]:
            del node[key]
        node.update(before)
    elif isinstance(node, list):
        node[:] = before
    elif is_array(node):
        node[...] = before
    elif isinstance(before, dict):
        for name, part in before.items():
            object.__setattr__(node, name, part)
    else:
        node.clear()
        for part in before:
            node.add(part) if isinstance(node, set) else node.append(part)
