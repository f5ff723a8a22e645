"""Lines of code that are shown to a reader, and are what is run on copies.

Invariant: what is simulated of a lever is the text that its option shows.
"""

from __future__ import annotations

import ast
import importlib
import warnings
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from autobatch.errors import LeverError, WorkloadError
from autobatch.support.patching import environment_kept
from autobatch.support.wording import said_by
from autobatch.workload.optimizers import made_for, names_of

__all__ = ["BatchCode", "ModelCode", "OptimizerCode", "ShardingCode", "run"]


def run(text: str, **names: Any) -> dict[str, Any]:
    """Run lines of code, without the warnings of libraries; return what they leave bound to names.

    Raises:
        WorkloadError: the lines failed; the cause is chained.

    >>> run("double = 2 * number", number=4)["double"]
    8
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exec(compile(text, "<a lever's code>", "exec"), names)
    except Exception as error:
        names.clear()  # the error's traceback holds them, and a simulated model with them
        lines = text.strip().splitlines()
        raise WorkloadError(f"{lines[-1].strip()!r} failed: {said_by(error)}") from error
    return names


def imported(text: str) -> None:
    """Import the libraries that lines of code import, before a simulation makes their tensors fake.

    >>> imported("from torch import nn")
    """
    with environment_kept():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.module:
                importlib.import_module(node.module)


@dataclass(frozen=True, slots=True)
class ModelCode:
    """A change of a copied model: lines that change `model`, or bind another module to the name.

    Attributes:
        lever: the name of the lever that it is of.
        text: the lines.
    """

    lever: str
    text: str

    def __post_init__(self) -> None:
        """Import what the lines do."""
        imported(self.text)

    def __call__(self, model: nn.Module) -> nn.Module:
        """Change a model and return it, or what takes its place."""
        changed: nn.Module = run(self.text, model=model)["model"]
        return changed


@dataclass(frozen=True, slots=True)
class ShardingCode:
    """A policy of sharing a model out: lines that do it to `model`.

    Attributes:
        text: the lines.
    """

    text: str

    def __call__(self, model: nn.Module) -> None:
        """Share a model out, in place."""
        run(self.text, model=model)


@dataclass(frozen=True, slots=True)
class BatchCode:
    """Makes batches as another function does, and has lines of code change `batch`.

    Attributes:
        make: the other function.
        text: the lines.
    """

    make: Any
    text: str

    def __call__(self, n: int) -> Any:
        """Return a changed batch of n samples."""
        return run(self.text, batch=self.make(n))["batch"]

    @property
    def notes(self) -> tuple[str, ...]:
        """What is to be said of the batches."""
        return tuple(getattr(self.make, "notes", ()))

    @property
    def batch_dims(self) -> Any:
        """Where the batch dimension was said to be."""
        return getattr(self.make, "batch_dims", None)

    @property
    def rivals(self) -> tuple[BatchCode, ...]:
        """Makers of batches of the same data set that may take more memory."""
        return tuple(BatchCode(rival, self.text) for rival in getattr(self.make, "rivals", ()))


@dataclass(frozen=True, slots=True)
class OptimizerCode:
    """Makes an optimizer: lines that bind one to `optimizer`, for a `model`.

    Lines that bind `optimizers` to a dict have made one for each parameter, which its hook steps.

    Attributes:
        text: the lines; they may make it of `optimizer`, the one that is given.
        given: an instance, or what makes one of the parameters or of the model.
    """

    text: str
    given: Any

    def __post_init__(self) -> None:
        """Import what the lines do."""
        imported(self.text)

    def __call__(self, model: nn.Module) -> Any:
        """Return the optimizer of a model."""
        names: dict[str, Any] = {"model": model}
        if "optimizer.param_groups" in self.text:
            names["optimizer"] = made_for(self.given, model)
        made = run(self.text, **names)
        if "optimizers" in made:
            optimizers = list(made["optimizers"].values())
            kind = type(f"{names_of(optimizers)}InBackward", (InBackward,), {})
            return kind(optimizers, made)
        return made["optimizer"]


class InBackward:
    """Optimizers that hooks step in the backward pass, as one whose step does nothing.

    Attributes:
        param_groups: of all of them.
        let_go: parts parameters, hooks and optimizers, a cycle that Python's collector does not
            see.
    """

    def __init__(self, optimizers: list[Any], names: dict[str, Any]) -> None:
        """Take optimizers, one for each parameter.

        `names` are what the hooks of the parameters read.
        """
        self._optimizers = optimizers
        self.let_go = names.clear
        self.param_groups = [group for one in optimizers for group in one.param_groups]
        self._stepped: set[int] = set()
        once = partial(_require_first_step, self._stepped)
        for optimizer in optimizers:
            optimizer.register_step_pre_hook(once)

    @property
    def state(self) -> dict[Any, Any]:
        """What all of them keep of their parameters."""
        return {key: kept for one in self._optimizers for key, kept in one.state.items()}

    def step(self, closure: Any = None) -> None:
        """Do nothing: the hooks have stepped."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Begin the next window: the hooks have dropped the gradients."""
        self._stepped.clear()


def _require_first_step(stepped: set[int], optimizer: Any, args: Any, kwargs: Any) -> None:
    if id(optimizer) in stepped:
        raise LeverError(
            "an optimizer in the backward pass would step once for each micro-batch: run windows "
            "of one micro-batch, or step after the last"
        )
    stepped.add(id(optimizer))
