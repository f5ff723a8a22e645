"""What a plan's peak may do without, as sections: a line each on one screen, or all that is known.

Invariant: nothing is said where nothing was found; every figure is that of `advice.savings`.
"""

from __future__ import annotations

from autobatch.advice.savings import Saving, savings_of
from autobatch.records.plan_record import PlanRecord
from autobatch.report.document import Bullets, Facts, Section, printable
from autobatch.report.footprint_summary import share
from autobatch.support.units import format_bytes

__all__ = ["large_savings", "savings_section"]

_TITLE = "What could go"

_LARGE = 0.05
"""The share of the peak from which on a screen of the answer names it."""


def savings_section(plan: PlanRecord) -> tuple[Section, ...]:
    """Return the section about all that may go; none where nothing was found."""
    found = savings_of(plan)
    if not found:
        return ()
    items = tuple(f"{_size(saving, plan)}: {printable(saving.text)}" for saving in found)
    return (Section(_TITLE, (Bullets(items),)),)


def large_savings(plan: PlanRecord) -> tuple[Section, ...]:
    """Return a section with a line for each large part of the peak that may go."""
    least = _LARGE * plan.footprint.peak_allocated_bytes
    pairs = tuple(
        (_size(saving, plan), printable(saving.brief))
        for saving in savings_of(plan)
        if saving.size_bytes >= least
    )
    return (Section(_TITLE, (Facts(pairs),)),) if pairs else ()


def _size(saving: Saving, plan: PlanRecord) -> str:
    """Say how much may go, and which share of the peak that is."""
    size = saving.size_bytes
    return f"{format_bytes(size)} ({share(size, plan.footprint.peak_allocated_bytes)})"
