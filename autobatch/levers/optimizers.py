"""Which optimizer a training run has, so that one of its kind can be made anew.

Invariant: no optimizer of the user's is made or changed here; at most, a function that makes one
of parameters is asked for one over a stand-in of four numbers.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from autobatch.levers.code import OptimizerCode
from autobatch.workload.optimizers import is_optimizer
from autobatch.workload.workload import Workload

__all__ = ["KnownOptimizer", "known_optimizer"]


@dataclass(frozen=True, slots=True)
class KnownOptimizer:
    """The one optimizer of a training run.

    Attributes:
        kind: its class.
        keywords: what its constructor is given beside the parameters, as values that code can
            write; None where it comes as an object, whose groups have the settings, or where code
            cannot.
        options: its settings, by name.
        groups: how many groups of parameters it has, as far as is known; 1 where the run makes it.
        given: the object, where it comes as one.
    """

    kind: type[torch.optim.Optimizer]
    keywords: Mapping[str, Any] | None
    options: Mapping[str, Any]
    groups: int = 1
    given: torch.optim.Optimizer | None = None

    @property
    def has_stepped(self) -> bool:
        """Whether it has a state that one that is made anew does not have."""
        return self.given is not None and bool(self.given.state)

    def holds(self, model: nn.Module) -> bool:
        """Whether it updates all parameters of a model that are to be trained, as far as known."""
        if self.given is None:
            return True
        held = {id(each) for group in self.given.param_groups for each in group["params"]}
        return all(id(each) in held for each in model.parameters() if each.requires_grad)

    @property
    def is_pytorchs(self) -> bool:
        """Whether its class is one of `torch.optim`."""
        return getattr(torch.optim, self.kind.__name__, None) is self.kind

    def takes(self, name: str) -> bool:
        """Whether the constructor has an argument of a name."""
        return name in inspect.signature(self.kind).parameters

    def called(self, name: str, parameters: str, keep: tuple[str, ...], **changes: Any) -> str:
        """Return the call of a constructor, with the settings of this optimizer that it takes."""
        kept = {key: value for key, value in (self.keywords or {}).items() if key in keep}
        arguments = [f"{key}={value!r}" for key, value in {**kept, **changes}.items()]
        return f"{name}({', '.join([parameters, *arguments])})"


def known_optimizer(workload: Workload) -> KnownOptimizer | None:
    """Return the optimizer of a workload; None where there are several, or its kind is not known.

    >>> from autobatch.workload.workload import Workload
    >>> sgd = partial(torch.optim.SGD, momentum=0.9)
    >>> known = known_optimizer(Workload(model=nn.Linear(1, 1), batch=list, optimizer=sgd))
    >>> known.called("torch.optim.SGD", "model.parameters()", ("lr", "momentum"))
    'torch.optim.SGD(model.parameters(), momentum=0.9)'
    """
    given: Any = workload.optimizer
    if isinstance(given, OptimizerCode) or is_optimizer(given):
        made = given
        if isinstance(given, OptimizerCode):
            return None
        if not isinstance(made, torch.optim.Optimizer):
            return None
        return KnownOptimizer(type(made), None, made.defaults, len(made.param_groups), made)
    keywords: Mapping[str, Any] = {}
    kind = given
    if isinstance(given, partial) and not given.args:
        kind, keywords = given.func, given.keywords
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer):
        stand_in = _tried(given)
        options = {} if stand_in is None else stand_in.defaults
        return KnownOptimizer(kind, _written(keywords), options)
    stand_in = _tried(given)
    if stand_in is None:
        return None
    return KnownOptimizer(type(stand_in), None, stand_in.defaults, len(stand_in.param_groups))


def _written(keywords: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return keywords as code can write them; None where one has no such form.

    >>> _written({"lr": torch.tensor(0.5), "betas": (0.5, torch.tensor(0.25))})
    {'lr': 0.5, 'betas': (0.5, 0.25)}
    >>> _written({"lr": float("inf")}), _written({"hook": print})
    (None, None)
    """
    plain = {name: _plain(value) for name, value in keywords.items()}
    try:
        is_same = all(ast.literal_eval(repr(value)) == value for value in plain.values())
    except (ValueError, SyntaxError):
        return None
    return plain if is_same else None


def _plain(value: Any) -> Any:
    """Return numbers of NumPy and tensors of one number as Python's, in tuples and lists too."""
    if isinstance(value, (tuple, list)):
        return type(value)(map(_plain, value))
    is_number = getattr(value, "shape", None) == ()  # a scalar of NumPy has a shape, too
    return value.item() if is_number else value


def _tried(make: Any) -> torch.optim.Optimizer | None:
    """Return the optimizer that a function makes of a stand-in for parameters, if it does."""
    if not callable(make):
        return None
    try:
        made = make([nn.Parameter(torch.empty(2, 2, device="meta"))])
    except Exception:  # it takes the model, or named parameters, or asks for more
        return None
    return made if isinstance(made, torch.optim.Optimizer) else None
