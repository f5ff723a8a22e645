"""Being told of an optimizer's steps, whether or not its class has hooks.

Invariant: the optimizer steps as it did; only the object that is given is changed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["after_steps", "before_steps"]


def before_steps(optimizer: torch.optim.Optimizer, call: Callable[..., None]) -> Any:
    """Call a function before each step; return a handle, a context manager, that ends it."""
    if hasattr(optimizer, "_optimizer_step_pre_hooks"):
        return optimizer.register_step_pre_hook(call)
    return _Wrapped(optimizer, call, _nothing)


def after_steps(optimizer: torch.optim.Optimizer, call: Callable[..., None]) -> Any:
    """Call a function after each step; return a handle, a context manager, that ends it."""
    if hasattr(optimizer, "_optimizer_step_post_hooks"):
        return optimizer.register_step_post_hook(call)
    return _Wrapped(optimizer, _nothing, call)


def _nothing(*_: Any) -> None:
    pass


class _Wrapped:
    """The step of an optimizer whose class never calls `Optimizer.__init__`."""

    def __init__(
        self, optimizer: Any, before: Callable[..., None], after: Callable[..., None]
    ) -> None:
        plain = optimizer.step

        @functools.wraps(plain)
        def step(*args: Any, **kwargs: Any) -> Any:
            before(optimizer)
            result = plain(*args, **kwargs)
            after(optimizer)
            return result

        self._optimizer, self._plain = optimizer, plain
        optimizer.step = step

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        self._optimizer.step = self._plain
