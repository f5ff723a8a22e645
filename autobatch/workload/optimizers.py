"""Optimizers by what they do: by name, one or several, wrapped, or made by a function.

Invariant: nothing here steps an optimizer or changes one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from autobatch.errors import UsageError, WorkloadError
from autobatch.support.wording import near

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = [
    "OPTIMIZERS",
    "each_of",
    "innermost",
    "is_optimizer",
    "made_for",
    "mapped",
    "named_optimizer",
    "names_of",
    "needs_closure",
    "parameters_of",
    "require_optimizers",
    "state_of",
]

OPTIMIZERS = {
    "adadelta": "Adadelta",
    "adafactor": "Adafactor",
    "adagrad": "Adagrad",
    "adam": "Adam",
    "adamax": "Adamax",
    "adamw": "AdamW",
    "nadam": "NAdam",
    "radam": "RAdam",
    "rmsprop": "RMSprop",
    "sgd": "SGD",
    "sgd-momentum": "SGD",
}
"""Names, as on the command line, of classes in `torch.optim`."""

_TAKES_NAMES = frozenset(("named_parameters", "named_params"))
_TAKES_MODEL = frozenset(("model", "module", "net", "network"))
"""How functions that make optimizers name what they take, if that is not the parameters."""

_DEEPEST = 6
"""Objects in objects in which state is looked for."""


def named_optimizer(name: str) -> Callable[..., Any]:
    """Return an optimizer by its name, with PyTorch's defaults.

    Raises:
        UsageError: none has that name.

    >>> named_optimizer("AdamW").__name__
    'AdamW'
    """
    import torch

    known = name.lower()
    if known not in OPTIMIZERS:
        names = ", ".join(OPTIMIZERS)
        hint = near(known, OPTIMIZERS)
        raise UsageError(f"optimizer is {name!r}, which is no name of one{hint}; known: {names}")
    kind: Callable[..., Any] = getattr(torch.optim, OPTIMIZERS[known])
    if known == "sgd-momentum":
        return partial(torch.optim.SGD, lr=1e-3, momentum=0.9)
    return kind


def mapped(call: Callable[[Any], Any], given: Any) -> Any:
    """Return one optimizer, or a list, tuple or dict of them, with a function applied to each.

    >>> mapped(str.upper, {"generator": "adam", "others": ["sgd", "muon"]})
    {'generator': 'ADAM', 'others': ['SGD', 'MUON']}
    """
    if isinstance(given, Mapping):
        return {name: mapped(call, part) for name, part in given.items()}
    if isinstance(given, (list, tuple)):
        parts = [mapped(call, part) for part in given]
        return parts if isinstance(given, list) else tuple(parts)
    return call(given)


def each_of(given: Any) -> list[Any]:
    """Return the optimizers of a list, tuple or dict, in order, each once; or the one that is.

    >>> each_of(["adam", ("sgd", "adam")])
    ['adam', 'sgd']
    """
    found: dict[int, Any] = {}
    mapped(lambda one: found.setdefault(id(one), one), given)
    return list(found.values())


def is_optimizer(value: Any) -> bool:
    """Whether an object steps over parameters, whatever its class: a wrapper of another does.

    >>> import torch
    >>> is_optimizer(torch.optim.SGD([torch.ones(1)])), is_optimizer(torch.optim.SGD)
    (True, False)
    """
    asked = ("step", "zero_grad", "param_groups")
    return not isinstance(value, type) and all(hasattr(value, name) for name in asked)


def require_optimizers(given: Any) -> None:
    """Refuse what is no optimizer, makes none, and holds none.

    Raises:
        UsageError: the optimizer, or one of several, is something else.
    """
    optimizers = each_of(given)
    if not optimizers:
        raise UsageError(f"optimizer is {given!r}: there is none in it")
    for one in optimizers:
        if not callable(one) and not is_optimizer(one):
            raise UsageError(
                f"optimizer is {_short(given)}: use an instance, a class such as "
                "torch.optim.AdamW, a callable on parameters, or a list or dict of several "
                "optimizers"
            )


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 100 else f"{text[:99]}…"


def made_for(given: Any, model: nn.Module) -> Any:
    """Return an optimizer that a function makes for a model; a list or dict of several likewise.

    The function gets the parameters that require a gradient. One whose first argument is called
    `named_parameters` gets them with their names, and one that calls it `model` gets the module.

    Raises:
        WorkloadError: there is nothing to train, or what was made is no optimizer.
    """
    if is_optimizer(given):
        return given
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    first = _first_argument(given)
    if not trainable and first not in _TAKES_MODEL:
        raise WorkloadError("no parameter requires a gradient: there is nothing to train")
    taken: Any = list(trainable.values())
    if first in _TAKES_NAMES:
        taken = list(trainable.items())
    elif first in _TAKES_MODEL:
        taken = model
    made = given(taken)
    for one in each_of(made):
        if not is_optimizer(one):
            raise WorkloadError(
                f"the function given as optimizer returned a {type(one).__name__}: return an "
                "optimizer, or a list or dict of several"
            )
    return made


def _first_argument(function: Any) -> str:
    try:
        return next(iter(inspect.signature(function).parameters), "")
    except (TypeError, ValueError):  # no function, or one without a signature
        return ""


def names_of(optimizers: Iterable[Any]) -> str:
    """Return the names of the classes of optimizers, each once, for a reader.

    >>> import torch
    >>> kinds = torch.optim.SGD, torch.optim.AdamW, torch.optim.SGD
    >>> names_of(kind([torch.ones(1)]) for kind in kinds)
    'SGD and AdamW'
    """
    names = list(dict.fromkeys(type(innermost(one)).__name__ for one in optimizers))
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1]))) if names else ""


def innermost(optimizer: Any) -> Any:
    """Return the optimizer that an accelerator prepared, which has the same state and groups."""
    while type(optimizer).__module__.startswith("accelerate.") and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def needs_closure(optimizer: Any) -> bool:
    """Whether an optimizer's step has to be given the function that computes the loss again.

    >>> import torch
    >>> [needs_closure(kind([torch.ones(1)])) for kind in (torch.optim.LBFGS, torch.optim.SGD)]
    [True, False]
    """
    try:
        closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    except (TypeError, ValueError):
        return False
    return closure is not None and closure.default is inspect.Parameter.empty


def parameters_of(optimizers: Iterable[Any]) -> Iterator[Tensor]:
    """Yield the parameters that optimizers hold, each once."""
    seen: set[int] = set()
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield parameter


def state_of(optimizer: Any, *, attributes: bool = False) -> Iterator[Tensor]:
    """Yield the tensors of an optimizer's state, in whatever containers and objects it has them.

    With `attributes`, also those that it has elsewhere, such as the averages of a wrapper; its
    parameters are among them where it has those.
    """
    from torch import Tensor, nn

    waiting: list[tuple[Any, int]] = [(getattr(optimizer, "state", None), 0)]
    if attributes:
        own = getattr(optimizer, "__dict__", {})
        waiting += [(part, 1) for name, part in own.items() if name != "param_groups"]
    seen: set[int] = set()
    while waiting:
        value, depth = waiting.pop()
        if isinstance(value, Tensor):
            yield value
            continue
        if depth > _DEEPEST or id(value) in seen or isinstance(value, (nn.Module, type)):
            continue
        seen.add(id(value))
        parts: Iterable[Any] = ()
        if isinstance(value, Mapping):
            parts = list(value.values())
        elif isinstance(value, (list, tuple, set, frozenset)):
            parts = list(value)
        elif not callable(value):
            parts = list(getattr(value, "__dict__", {}).values())
        waiting.extend((part, depth + 1) for part in parts)
