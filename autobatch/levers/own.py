"""Levers of the user's own: what they raise, return or change in place is told, naming the lever.

Invariant: what a lever changed of the user's model, loss or optimizer is put back before its error
is told; only values of tensors stay, and the error names those.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from autobatch.errors import AutobatchError, WorkloadError
from autobatch.levers.known import LEVERS
from autobatch.levers.lever import Lever, Option, WrongLeverError, require_setup
from autobatch.levers.setup import Setup
from autobatch.levers.untouched import State
from autobatch.support.exits import exits_reported
from autobatch.support.wording import listed, one_line

__all__ = ["OwnLevers"]

_TOLD = 3
"""So many of the things that a lever changed in place are named."""


class OwnLevers:
    """Calls levers of the user's own on behalf of one training run."""

    def __init__(self, setup: Setup) -> None:
        """Take the training run, whose model, loss and optimizer are to stay as they are."""
        self._workload = setup.workload
        self._state: State | None = None

    def checked(self, levers: Iterable[Lever]) -> list[Lever]:
        """Return levers of which those of the user's own are checked whenever they are called."""
        return [
            lever
            if LEVERS.get(lever.name) is lever
            else replace(lever, options=partial(self._options, lever))
            for lever in levers
        ]

    def require_untouched(self, label: str) -> None:
        """Check what is trained after a run with what such levers gave.

        Args:
            label: what ran.

        Raises:
            WrongLeverError: something of the user's was changed in place.
        """
        if self._state is not None:
            self._put_back(f"a run with {label}")

    @contextmanager
    def running(self, name: str) -> Iterator[None]:
        """Let code of a lever run in the block.

        Raises:
            WorkloadError: the code raised an error, which is none of autobatch's.
            WrongLeverError: it changed something of the user's in place.
        """
        if self._state is None:
            workload = self._workload
            self._state = State(
                model=workload.model, optimizer=workload.optimizer, loss=workload.loss
            )
        who = f"the lever {name}"
        try:
            with exits_reported(who):
                yield
        except AutobatchError as error:
            self._put_back(who, error)
            raise
        except Exception as error:
            self._put_back(who, error)
            raise WorkloadError(f"{who} raised {one_line(error)}") from error
        except BaseException:
            self._state.put_back()
            raise
        self._put_back(who)

    def applied(self, name: str, change: Callable[[Setup], Any], setup: Setup) -> Setup:
        """Return what a lever's function makes of a setup.

        Raises:
            WorkloadError: the function raised an error, which is none of autobatch's.
            WrongLeverError: it made something else, or changed something of the user's in place.
        """
        with self.running(name):
            changed = change(setup)
        return require_setup(name, changed)

    def _options(self, lever: Lever, setup: Setup) -> Sequence[Option]:
        with self.running(lever.name):
            offered: Any = lever.options(setup)
            options = list(offered) if isinstance(offered, Iterable) else [offered]
        wrong = [each for each in options if not isinstance(each, Option)]
        if wrong:
            raise WrongLeverError(
                f"the lever {lever.name} offered a {type(wrong[0]).__name__}: let options(setup) "
                "return a list of Options, which is empty where the lever does not apply"
            )
        return [
            replace(option, apply=partial(self.applied, lever.name, option.apply))
            for option in options
        ]

    def _put_back(self, who: str, error: Exception | None = None) -> None:
        """Put back what was changed in place.

        Args:
            who: changed it, if anything was.
            error: what it raised.

        Raises:
            WrongLeverError: something was changed.
        """
        assert self._state is not None
        changed = self._state.changes()
        if not changed:
            return
        self._state.put_back()
        left = self._state.changes()
        outcome = "it is as before again"
        if left:
            outcome = f"{listed(left, _TOLD)} cannot be put back: build the model anew"
        raise WrongLeverError(
            f"{who} changed what you train in place ({listed(changed, _TOLD)}); {outcome}. A lever "
            "is to return setup.changed(change), whose change(model) changes the copy that it is "
            "given, or setup.having(...) with another optimizer or loss"
        ) from error
