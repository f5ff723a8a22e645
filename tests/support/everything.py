"""What everything that can be reached from some objects is: written down, to be compared later.

It shares no code with the walk that it checks: it reads, and follows every reference it knows.
"""

from __future__ import annotations

import sys
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch

_UNREAD = ("__dict__", "__slotnames__")  # the second is a note of Python's own, made by `copyreg`


def everything(**roots: Any) -> dict[str, Any]:
    """Return a description of every object within reach, by the path that leads to it."""
    found: dict[str, Any] = {}
    keep: list[Any] = []
    seen: set[int] = set()
    waiting = list(roots.items())
    while waiting:
        path, value = waiting.pop()
        found[path] = _described(value)
        if id(value) in seen or isinstance(value, ModuleType):
            continue
        seen.add(id(value))
        keep.append(value)
        waiting += [(f"{path}{name}", part) for name, part in _parts(value)]
    del keep
    return found


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Return what is not as it was, in words."""
    return [
        f"{path}: {before.get(path, 'nothing')} became {after.get(path, 'nothing')}"
        for path in sorted(before.keys() | after.keys())
        if before.get(path) != after.get(path)
    ]


def _described(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        numbers = value.detach().flatten().tolist()
        grad = None if not value.is_leaf or value.grad is None else id(value.grad)
        return (
            type(value).__name__, id(value), value._version, str(value.device), value.requires_grad,
            grad, numbers,
        )  # fmt: skip
    if isinstance(value, torch.Generator):
        return id(value), value.get_state().tolist()
    if isinstance(value, (int, float, str, bool, type(None))):
        return value
    if isinstance(value, MethodType):
        return id(value.__self__), id(value.__func__)
    if isinstance(value, (list, dict, tuple, set)):
        return type(value).__name__, id(value), len(value)
    return type(value).__name__, id(value)


def _parts(value: Any) -> list[tuple[str, Any]]:
    parts: list[tuple[str, Any]] = []
    if isinstance(value, dict):
        parts += [(f"[{n}] key", key) for n, key in enumerate(value)]
        parts += [(f"[{n}]", part) for n, part in enumerate(value.values())]
    elif isinstance(value, (list, tuple)):
        parts += [(f"[{n}]", part) for n, part in enumerate(value)]
    elif isinstance(value, FunctionType):
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            parts.append((f".{name}", cell.cell_contents))
        parts += [(".defaults", value.__defaults__), (".kwdefaults", value.__kwdefaults__)]
        parts.append((".__dict__", value.__dict__))
        if _is_in_tests(value.__module__):
            known = value.__globals__
            names = [name for name in value.__code__.co_names if name in known]
            parts += [(f" global {name}", known[name]) for name in names]
    elif isinstance(value, MethodType):
        parts += [(".self", value.__self__), (".func", value.__func__)]
    elif isinstance(value, type):
        if _is_in_tests(value.__module__):
            parts += [(f".{n}", part) for n, part in vars(value).items() if n not in _UNREAD]
    elif not isinstance(value, torch.Tensor):
        parts.append((" class", type(value)))
        for name in ("func", "args", "keywords"):
            if hasattr(value, "func") and hasattr(value, name):
                parts.append((f".{name}", getattr(value, name)))
        slots = [name for kind in type(value).__mro__ for name in vars(kind).get("__slots__", ())]
        parts += [(f".{name}", getattr(value, name)) for name in slots if hasattr(value, name)]
    else:
        parts += [(".hooks", value._backward_hooks)]
        parts += [(".after hooks", getattr(value, "_post_accumulate_grad_hooks", None))]
    own = getattr(value, "__dict__", None)
    if isinstance(own, dict) and not isinstance(value, (type, FunctionType)):
        parts += [(f".{name}", part) for name, part in own.items()]
    return parts


def _is_in_tests(module: str | None) -> bool:
    return (module or "").startswith("tests") and module in sys.modules
