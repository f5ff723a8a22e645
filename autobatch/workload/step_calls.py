"""Being told of an optimizer's steps, whether or not its class has hooks.

Invariant: the optimizer steps as it did; only the object that is given is changed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import suppress
from typing import Any

__all__ = ["calls_hooks", "paused_in", "watch_steps"]

_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")


def calls_hooks(optimizer: Any) -> bool:
    """Whether an optimizer's steps call hooks: not of a class that leaves PyTorch's `__init__` out.

    >>> import torch
    >>> calls_hooks(torch.optim.SGD([torch.zeros(1, requires_grad=True)])), calls_hooks(object())
    (True, False)
    """
    is_hooked = getattr(getattr(type(optimizer), "step", None), "hooked", False)
    return is_hooked and all(hasattr(optimizer, name) for name in _HOOKS)


def watch_steps(
    optimizer: Any, before: Callable[..., Any], after: Callable[..., None]
) -> Callable[[], None]:
    """Call functions around each step of an optimizer; return what ends that.

    Hooks of the user's are outside: those before a step are called first, and those after it last.
    `before` gets the optimizer, the arguments and the named arguments of the step, and may return
    others in their place.
    """
    if not calls_hooks(optimizer):
        return _wrapped(optimizer, before, after)
    handles = [
        optimizer.register_step_pre_hook(before),
        optimizer.register_step_post_hook(after),
    ]
    hooks = optimizer._optimizer_step_post_hooks
    with suppress(AttributeError, KeyError):  # it need not be an OrderedDict
        hooks.move_to_end(handles[1].id, last=False)

    def end() -> None:
        for handle in handles:
            handle.remove()

    return end


def _wrapped(
    optimizer: Any, before: Callable[..., Any], after: Callable[..., None]
) -> Callable[[], None]:
    """Replace the step of an object whose class calls no hooks."""
    plain = optimizer.step

    @functools.wraps(plain)
    def step(*args: Any, **kwargs: Any) -> Any:
        changed = before(optimizer, args, kwargs)
        args, kwargs = (args, kwargs) if changed is None else changed
        result = plain(*args, **kwargs)
        after(optimizer, args, kwargs)
        return result

    had_own = "step" in getattr(optimizer, "__dict__", {})
    try:
        optimizer.step = step
    except AttributeError:  # a class with slots: its steps pass unseen
        return lambda: None

    def end() -> None:
        if had_own:
            optimizer.step = plain
        else:
            del optimizer.step

    return end


def paused_in(
    args: tuple[Any, ...], kwargs: dict[str, Any], pause: Callable[[], Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a step with a closure that runs in the context that `pause` makes."""

    def around(closure: Any) -> Any:
        @functools.wraps(closure, updated=())
        def called(*inner: Any, **named: Any) -> Any:
            with pause():
                return closure(*inner, **named)

        return called

    if args and callable(args[0]):
        return (around(args[0]), *args[1:]), kwargs
    if callable(kwargs.get("closure")):
        return args, {**kwargs, "closure": around(kwargs["closure"])}
    return args, kwargs
