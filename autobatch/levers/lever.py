"""What a lever is: a kind of change to a training run, with the settings that it may have.

Invariant: applying an option gives another `Setup`; the first and the user's objects stay the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from autobatch.errors import UsageError
from autobatch.levers.setup import Setup
from autobatch.records.applied import AppliedLever

__all__ = ["Lever", "Option", "WrongLeverError", "applied", "require_setup"]


class WrongLeverError(UsageError):
    """A lever of the user's own is not written as levers have to be, whatever it is applied to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One setting of a lever, for one training run.

    Attributes:
        lever: the name of its lever, such as "checkpointing".
        value: the setting, such as "every block".
        what: what it does, in one sentence.
        code: lines of plain PyTorch that do it to `model`, `optimizer`, `batch` or the loop.
        trainer: arguments of Transformers' `TrainingArguments` that do it, or None.
        changes_numerics: whether training computes something else than without it.
        apply: gives the setup that has it.
        keeps_state: whether parameters, buffers, gradients and optimizer state take no less memory
            with it, so that it cannot help a run that these alone keep from fitting.
        excludes: names of levers, or labels of options, that it cannot be combined with; another
            option of its own lever never can be.
    """

    lever: str
    value: str
    what: str
    code: str
    apply: Callable[[Setup], Setup]
    trainer: str | None = None
    changes_numerics: bool = False
    keeps_state: bool = False
    excludes: frozenset[str] = frozenset()

    @property
    def label(self) -> str:
        """The lever and its setting, as tables name them."""
        return f"{self.lever}: {self.value}"

    def applied_to(self, setup: Setup) -> Setup:
        """Return the setup that has it, and whose plans say so.

        Raises:
            WrongLeverError: `apply` gives something else than a setup.
        """
        had = AppliedLever(lever=self.lever, value=self.value, code=self.code, trainer=self.trainer)
        changed = require_setup(self.lever, self.apply(setup))
        return changed.having(levers=(*setup.workload.levers, had))

    def goes_with(self, other: Option) -> bool:
        """Whether a training run can have this option and another one."""
        return not (
            self.lever == other.lever
            or self.excludes & {other.lever, other.label}
            or other.excludes & {self.lever, self.label}
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Lever:
    """A kind of change, and which settings of it a training run could have.

    Attributes:
        name: as on the command line.
        what: what it changes, in one sentence.
        options: `options(setup)` gives the settings that the setup could be given and does not
            have; none where the lever does not apply, or a library that it needs is missing.
    """

    name: str
    what: str
    options: Callable[[Setup], Sequence[Option]]


def applied(setup: Setup, options: Iterable[Option]) -> Setup:
    """Return a setup that has all of some options, applied in their order.

    Raises:
        UsageError: two of them cannot be combined.
    """
    had: list[Option] = []
    for option in options:
        for other in had:
            if not option.goes_with(other):
                raise UsageError(
                    f"{other.label} and {option.label} cannot be combined: leave one of them out"
                )
        setup = option.applied_to(setup)
        had.append(option)
    return setup


def require_setup(lever: str, changed: Any) -> Setup:
    """Return what a lever made of a setup.

    Raises:
        WrongLeverError: it is none.
    """
    if not isinstance(changed, Setup):
        raise WrongLeverError(
            f"the lever {lever} made a {type(changed).__name__} of a Setup: let it return "
            "setup.having(...), setup.changed(...) or the setup itself"
        )
    return changed
