"""Progress of long work, passed to the caller's function; the library itself prints nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from autobatch.records.evidence import Trial

__all__ = ["Progress", "ProgressCallback", "silent"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """One step that begins, or a trial that has just finished.

    Attributes:
        step: what is being done, such as "run" or "search", in a few words for people.
        executions: trials finished so far.
        expected: trials expected in all, as far as is known now.
        micro_batch: the size being tried; None where there is none.
        trial: the trial that has just finished; None where a step begins.
    """

    step: str
    executions: int
    expected: int
    micro_batch: int | None = None
    trial: Trial | None = None


ProgressCallback = Callable[[Progress], None]


def silent(_: Progress) -> None:
    """Ignore progress; the default."""
