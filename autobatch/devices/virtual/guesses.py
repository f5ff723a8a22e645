"""What is assumed of values where code asks for them, and learned when it does not go through.

Code checks values and raises: boxes have a width, times increase. A placeholder may fail such a
check. Then the run is made again, with the last read before the error answered the other way; if
the same error comes again, that read is answered as before, and the one before it is tried. And
code that compares one choice with each of E numbers (experts, classes) finds every element once:
the run is made again with an E-th of the elements in each. Code also branches on values without
raising: then the run is made once more for each such place, answered the other way, and the answer
that needs most memory stays.

Invariant: a run that is made again starts from new copies of the user's objects, and what was
assumed is in the notes of the run.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch

from autobatch.devices.virtual.unknown_floats import UnknownFloat
from autobatch.support.torch_private import DISPATCHING_MODULES

__all__ = ["Guesses"]

_TRIES = 12
_BRANCHES = 8
"""Runs that are made to find the branches that need most memory."""

_OURS = "autobatch.devices."
_PYTORCH = str(Path(torch.__file__).parent)
_NOWHERE = ("unknown", 0, 0)

Site = tuple[str, int, int]
"""A place in the user's code: file, line, and instruction."""


class Guesses:
    """The answers to reads of unknown values, by the place in the code that reads.

    Attributes:
        is_trying: whether the run is one of those that look for the branch that needs most.
    """

    def __init__(self) -> None:
        self._turned: dict[Site, Any] = {}
        self._choice: dict[Site, int] = {}
        self._tried: set[Site] = set()
        self._read: dict[Site, Any] = {}
        self._compared: dict[Site, dict[int, tuple[object, set[Any]]]] = {}
        self._parts: dict[Site, int] = {}
        self._last: tuple[Site, Any] | None = None
        self._failures = 0
        self._decides: dict[Site, tuple[Any, ...]] = {}
        self._heavier: dict[Site, Any] = {}
        self._numbers: dict[Site, int] = {}
        self._is_settled = False
        self.is_trying = False

    @property
    def is_unused(self) -> bool:
        """Whether no value decided anything so far: runs were as with any other answers."""
        return not (
            self._turned or self._decides or self._heavier or self._numbers or self._parts
        ) and not any(self._compared.values())

    def begin(self) -> None:
        """Start a run."""
        self._read.clear()
        self._compared.clear()
        self._numbers.clear()

    def answer(self, value: Any, most: int | None = None) -> Any:
        """Return what a read gives whose placeholder is `value`, and remember the read.

        Args:
            value: of the placeholder; a truth value decides something.
            most: what a whole number may be at most.
        """
        site = _site()
        self._read.pop(site, None)
        if site in self._heavier:
            return self._heavier[site]
        if site not in self._turned:
            self._read[site] = value
            if site[0].startswith(_PYTORCH):  # its branches are checks
                return value
            if type(value) is bool:
                self._decides.setdefault(site, (not value,))
            elif most is not None and most > value:
                self._decides.setdefault(site, (most,))
            elif most is None and value == 1 and type(value) is int:  # the default: no bound
                self._numbers.setdefault(site, value)
            return value
        others = _others(value)
        return others[min(self._choice[site], len(others) - 1)]

    def number_compared(self) -> None:
        """Note that a whole number of which nothing is known is compared here."""
        site = _site()
        if not site[0].startswith(_PYTORCH):
            self._numbers.setdefault(site, 1)

    def float_read(self, value: float) -> UnknownFloat:
        """Return a float that was just read, which tells when code compares it."""
        site = next(reversed(self._read), _NOWHERE)

        def compared() -> None:
            if site in self._read and not site[0].startswith(_PYTORCH):
                self._decides.setdefault(site, _others(value))

        return UnknownFloat.made(value, compared)

    def branches(self) -> Iterator[Callable[[bool], None]]:
        """Answer one place after the other in another way; each is told whether that stays.

        There are none after the first time: what was found holds for all sizes.
        """
        if self._is_settled:
            return
        self._is_settled = self.is_trying = True
        try:
            for site, other in islice(self._alternatives(), _BRANCHES):
                before = self._heavier.get(site, self)
                self._heavier[site] = other
                yield partial(self._settle, site, before)
        finally:
            self.is_trying = False

    def _alternatives(self) -> Iterator[tuple[Site, Any]]:
        """Yield other answers; a branch that is taken may show further places."""
        done: set[Site] = set()
        while site := next((each for each in self._decides if each not in done), None):
            done.add(site)
            if site not in self._turned:
                yield from ((site, other) for other in self._decides[site])

    def _settle(self, site: Site, before: Any, stays: bool) -> None:
        if stays:
            return
        if before is self:
            del self._heavier[site]
        else:
            self._heavier[site] = before

    def share(self, origin: object, constant: Any) -> float:
        """Return which share of the numbers of one choice is equal to a constant, at most."""
        site = _site()
        _, constants = self._compared.setdefault(site, {}).setdefault(id(origin), (origin, set()))
        if isinstance(constant, (int, float)):
            constants.add(constant)
        return 1 / self._parts.get(site, 1)

    def learned(self) -> bool:
        """Return whether a run that went through showed what the next one can do better."""
        found = {
            site: max(len(constants) for _, constants in origins.values())
            for site, origins in self._compared.items()
        }
        new = {site: parts for site, parts in found.items() if parts > self._parts.get(site, 1)}
        self._parts.update(new)
        return bool(new)

    def turn(self, error: BaseException) -> bool:
        """Choose which read is answered the other way after an error; False where none is left."""
        self._failures += 1
        if self._failures > _TRIES:
            return False
        where = type(error), _raised_at(error.__traceback__)
        if self._last is not None and self._last[1] == where:  # that was not it
            site = self._last[0]
            self._choice[site] += 1
            if self._choice[site] < len(_others(self._turned[site])):
                return True
            self._turned.pop(site, None)
            self._last = None
        for site in reversed(self._read):
            if site not in self._tried:
                self._tried.add(site)
                self._turned[site], self._choice[site] = self._read[site], 0
                self._last = site, where
                return True
        return False

    def notes(self) -> Iterator[str]:
        """Say which reads were answered the other way, and what was spread."""
        for site, value in self._turned.items():
            other = _others(value)[self._choice[site]]
            yield (
                f"a value that is not known was read at {site[0]}:{site[1]} as {value}; the code "
                f"failed on it, and was run again with {other}"
            )
        for site, value in self._heavier.items():
            yield (
                f"what is read at {site[0]}:{site[1]} decides how much memory is needed, and is "
                f"not known: it was taken to be {value}, with which it is most"
            )
        if self._numbers:
            (file, line, _), value = next(iter(self._numbers.items()))
            yield (
                f"a whole number that is not known was read at {file}:{line} as {value}: if a size "
                "follows from it, the real run may need more memory"
            )
        if self._parts:
            places = ", ".join(f"{file}:{line}" for file, line, _ in list(self._parts)[:3])
            yield (
                f"elements that are picked by comparing them with several numbers ({places}) were "
                "taken to be spread equally over these: an uneven batch may need more memory"
            )


def _others(value: Any) -> tuple[Any, ...]:
    """Return what else a read may give whose placeholder is `value`."""
    if isinstance(value, bool):
        return (not value,)
    return (0, 2) if isinstance(value, int) else (0.0, 1000.0, -1.0)


def _site() -> Site:
    """Return the place in the code, outside of autobatch and PyTorch's dispatch, that runs."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        module = frame.f_globals.get("__name__") or ""
        if not module.startswith((_OURS, *DISPATCHING_MODULES)):
            return frame.f_code.co_filename, frame.f_lineno, frame.f_lasti
        frame = frame.f_back
    return _NOWHERE


def _raised_at(traceback: TracebackType | None) -> Site | None:
    place = None
    while traceback is not None:
        code = traceback.tb_frame.f_code
        place = code.co_filename, traceback.tb_lineno, traceback.tb_lasti
        traceback = traceback.tb_next
    return place
