"""What would let a run fit for which a plan was asked, told with the error that it does not."""

from __future__ import annotations

from autobatch.errors import AutobatchError, DoesNotFitError
from autobatch.levers.known import LEVERS
from autobatch.levers.setup import Setup
from autobatch.plan.advice import Choice
from autobatch.records.progress import ProgressCallback
from autobatch.support.wording import for_reader
from autobatch.tuning.advise import Search
from autobatch.workload.complete import Asked

__all__ = ["with_remedies"]

_SECONDS = 15.0
"""So long are levers tried."""

_TOLD = 3
"""So many of the remedies are told."""


def with_remedies(
    error: DoesNotFitError,
    asked: Asked,
    setup: Setup,
    *,
    target: int,
    headroom: float | None,
    progress: ProgressCallback,
) -> DoesNotFitError:
    """Return the error of a run that does not fit with what would let it, tried for some seconds.

    Args:
        error: says by how much it does not.
        asked: what was asked for.
        setup: the same, completed.
        target: effective batch.
        headroom: share of the usable memory to leave free, or None for the default.
        progress: told of each step.
    """
    search = Search(setup, asked, target, headroom, progress, seconds=_SECONDS)
    try:
        choices = search.choices(list(LEVERS.values()), allow=False)
    except AutobatchError:  # the answer is that it does not fit
        return error
    found = [_remedy(choice) for choice in choices if choice.fits][:_TOLD]
    if not found:
        return error
    more = for_reader("autobatch.advise tells", "`autobatch advise` tells")
    return DoesNotFitError(
        f"{error}. Simulated, it would fit with {'; or '.join(found)}: {more} the lines of code"
    )


def _remedy(choice: Choice) -> str:
    numbers = ", other numbers" if choice.changes_numerics else ""
    return f"{choice.label} (micro-batch up to {choice.ceiling:,}{numbers})"
