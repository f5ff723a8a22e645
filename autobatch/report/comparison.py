"""What a comparison of cards says, and the frontier of a parameter: as documents.

Invariant: seconds, throughput and cost are called estimates wherever they stand, unless a GPU was
measured.
"""

from __future__ import annotations

from autobatch.records.comparison import (
    ComparedCard,
    ComparisonRecord,
    FrontierPoint,
    FrontierRecord,
    Outcome,
    WindowTime,
)
from autobatch.report.document import (
    Bullets,
    Chart,
    Document,
    Facts,
    Section,
    Table,
    printable,
    told_sections,
)
from autobatch.support.units import format_bytes
from autobatch.support.wording import count

__all__ = [
    "comparison_document",
    "frontier_document",
    "money_text",
    "seconds_text",
    "sizes_text",
]

_RANGE = (
    "seconds a window and what follows from them are roofline estimates, with the range that four "
    "of five windows lie in; they are no measurements"
)


_CERTAINTY = "how likely the plan, and the ceiling, are to fit a real card"


def comparison_document(compared: ComparisonRecord, *, charts: bool = False) -> Document:
    """Return a comparison: the cards that fit as a table, those that do not, the warnings.

    Args:
        compared: the comparison.
        charts: whether it is followed by its chart, which a report folder has beside it.
    """
    fitting = compared.fitting
    others = [card for card in compared.cards if not card.outcome.fits]
    chart = Chart("comparison", "Estimated samples a second on each card, and what they cost.")
    drawn = charts and any(card.outcome.window for card in fitting)
    return Document(
        title=(
            f"{len(fitting)} of {count(len(compared.cards), 'card')} "
            "can train an effective batch of "
            f"{compared.target:,}"
        ),
        subtitle=_subtitle(compared),
        sections=(
            *([Section("", (_facts(compared),))]),
            *([Section("Cards that fit", (_cards(compared),))] if fitting else []),
            *([Section("", (chart,))] if drawn else []),
            *([_misfits(compared, others)] if others else []),
            *told_sections(compared.warnings, compared.notes),
        ),
    )


def _subtitle(compared: ComparisonRecord) -> str:
    shared = "" if compared.world_size == 1 else f", {compared.world_size:,} of each card"
    sharded = (
        "" if compared.sharding in (None, "ddp") else f" sharing the model ({compared.sharding})"
    )
    return (
        f"{printable(compared.model)}, {count(compared.parameters, 'parameter')}"
        f"{shared}{sharded}; "
        f"simulated, headroom {compared.headroom:g}"
    )


def _facts(compared: ComparisonRecord) -> Facts:
    pairs = []
    if (fastest := compared.fastest) is not None and len(compared.fitting) > 1:
        pairs.append(("fastest", f"{printable(fastest.gpu.name)}: {_pace(compared, fastest)}"))
    if (cheapest := compared.cheapest) is not None:
        cost = money_text(cheapest.cost_per_million)
        pairs.append(
            ("cheapest", f"{printable(cheapest.gpu.name)}: {cost} a million samples (estimate)")
        )
    if compared.fitting:
        pairs += [("estimates", _estimates(compared)), ("certainty", _CERTAINTY)]
    executed = count(compared.executions, "execution")
    pairs.append(("evidence", f"{executed} for all cards together, {compared.seconds:.1f} s"))
    return Facts(tuple(pairs))


def _pace(compared: ComparisonRecord, card: ComparedCard) -> str:
    window = card.outcome.window
    assert window is not None
    return f"{compared.target / window.seconds:,.0f} samples/s (estimate)"


def _estimates(compared: ComparisonRecord) -> str:
    unknown = [card.gpu.name for card in compared.fitting if card.outcome.window is None]
    without = f"; none for {printable(', '.join(unknown))}: speed unknown" if unknown else ""
    return (
        "none: no card's speed is known"
        if len(unknown) == len(compared.fitting)
        else (f"{_RANGE}{without}")
    )


def _cards(compared: ComparisonRecord) -> Table:
    priced = any(card.price_per_hour is not None for card in compared.cards)
    return Table(
        columns=(
            "card",
            "memory",
            "micro-batch",
            "steps",
            "ceiling",
            "certainty",
            "est. s/window",
            "bound by",
            *(("price/h", "est. cost/1M") if priced else ()),
        ),
        align="lrrrrrrl" + "rr" * priced,
        rows=tuple(
            (
                printable(card.gpu.name),
                format_bytes(card.gpu.capacity_bytes),
                *_plan_cells(card.outcome, compared.target, compared.world_size),
                seconds_text(card.outcome.window),
                (card.outcome.window.bound or "-") if card.outcome.window else "-",
                *(
                    (money_text(card.price_per_hour), money_text(card.cost_per_million))
                    if priced
                    else ()
                ),
            )
            for card in compared.fitting
        ),
    )


def sizes_text(outcome: Outcome, target: int, world_size: int) -> str:
    """Name the micro-batches of a plan: one size, or the two of a ragged window.

    >>> sizes_text(Outcome(micro_batch=255, accumulation_steps=2), 509, 1)
    '255 or 254'
    """
    assert outcome.micro_batch is not None and outcome.accumulation_steps is not None
    is_uniform = outcome.micro_batch * outcome.accumulation_steps * world_size == target
    return f"{outcome.micro_batch:,}" + ("" if is_uniform else f" or {outcome.micro_batch - 1:,}")


def _plan_cells(outcome: Outcome, target: int, world_size: int) -> tuple[str, ...]:
    """Return micro-batch, steps, ceiling, and how likely the plan and the ceiling fit."""
    if not outcome.fits:
        return ("-",) * 4
    more = "" if outcome.ceiling is not None else "+"
    return (
        sizes_text(outcome, target, world_size),
        f"{outcome.accumulation_steps:,}",
        f"{outcome.ceiling_at_least:,}{more}",
        _certainty(outcome),
    )


def _certainty(outcome: Outcome) -> str:
    if outcome.likelihood is None or outcome.ceiling_likelihood is None:
        return "ran"
    return f"{outcome.likelihood:.0%} / {outcome.ceiling_likelihood:.0%}"


def seconds_text(window: WindowTime | None) -> str:
    """Render a window's seconds, and the range of an estimate.

    >>> seconds_text(WindowTime(seconds=0.2416, low=0.1933, high=0.338, bound="memory"))
    '0.242 (0.193-0.338)'
    """
    if window is None:
        return "-"
    if window.low is None or window.high is None:
        return _figures(window.seconds)
    return f"{_figures(window.seconds)} ({_figures(window.low)}-{_figures(window.high)})"


def _figures(value: float) -> str:
    """Render a number with three significant figures, without an exponent."""
    for limit, digits in ((100, 0), (10, 1), (1, 2)):
        if value >= limit:
            return f"{value:,.{digits}f}"
    return f"{value:#.3g}" if value >= 1e-4 else f"{value:.1e}"


def money_text(amount: float | None) -> str:
    """Render a price or a cost: cents, and two figures of what is less than ten of them.

    >>> money_text(1234.5), money_text(0.00063), money_text(None)
    ('1,234.50', '0.00063', '-')
    """
    if amount is None:
        return "-"
    return f"{amount:,.2f}" if amount >= 0.1 or amount == 0 else f"{amount:.2g}"


def _misfits(compared: ComparisonRecord, others: list[ComparedCard]) -> Section:
    items = [f"{printable(card.gpu.name)}: {_why_not(card.outcome)}" for card in others]
    if any(card.outcome.short_bytes is not None for card in others):
        smallest = compared.smallest_card
        items.append(
            f"the smallest card of the catalogue that would do: {smallest}"
            if smallest is not None
            else "no card of the catalogue would do"
        )
    return Section("Cards without a plan", (Bullets(tuple(items)),))


def _why_not(outcome: Outcome) -> str:
    if outcome.failure is not None:
        return printable(outcome.failure)
    short = outcome.short_bytes
    assert short is not None and outcome.peak_reserved_bytes is not None
    assert outcome.budget_bytes is not None
    return (
        f"micro-batch {outcome.tried_micro_batch:,} needs "
        f"{format_bytes(outcome.peak_reserved_bytes)} reserved, the budget is "
        f"{format_bytes(outcome.budget_bytes)}: {format_bytes(short)} short"
    )


def frontier_document(frontier: FrontierRecord, *, charts: bool = False) -> Document:
    """Return a frontier: each value with its micro-batch and throughput, what does not fit.

    Args:
        frontier: of one parameter.
        charts: whether it is followed by its chart, which a report folder has beside it.
    """
    name = printable(frontier.parameter)
    fitting = [point for point in frontier.points if point.outcome.fits]
    others = [point for point in frontier.points if not point.outcome.fits]
    chart = Chart("frontier", f"Micro-batch and throughput against {frontier.parameter}.")
    ranks = "" if frontier.world_size == 1 else f" x {frontier.world_size:,}"
    return Document(
        title=f"micro-batch along {name}: "
        + ", ".join(f"{_sizes(frontier, p)} at {p.value:,}" for p in frontier.points),
        subtitle=(
            f"{printable(frontier.model)} on {printable(frontier.gpu.name)}{ranks}, for an "
            f"effective batch of {frontier.target:,}, headroom {frontier.headroom:g}"
        ),
        sections=(
            Section("", (_frontier_facts(frontier),)),
            *([Section("", (_points(frontier, fitting),))] if fitting else []),
            *([Section("", (chart,))] if charts and fitting else []),
            *(
                [
                    Section(
                        "Values without a plan",
                        (Bullets(tuple(f"{p.value:,}: {_why_not(p.outcome)}" for p in others)),),
                    )
                ]
                if others
                else []
            ),
            *told_sections(frontier.warnings, frontier.notes),
        ),
    )


def _sizes(frontier: FrontierRecord, point: FrontierPoint) -> str:
    if not point.outcome.fits:
        return "none"
    return sizes_text(point.outcome, frontier.target, frontier.world_size)


def _frontier_facts(frontier: FrontierRecord) -> Facts:
    pairs = []
    paces = [(frontier.throughput(point), point) for point in frontier.points]
    known = [(pace, point) for pace, point in paces if pace is not None]
    if known:
        pace, best = max(known, key=lambda each: each[0])
        pairs.append(
            (
                "fastest",
                f"{pace:,.0f} {frontier.unit}/s at {printable(frontier.parameter)} {best.value:,} "
                f"({_kind(best)})",
            )
        )
        if _kind(best) == "estimate":
            pairs += [("estimates", _RANGE), ("certainty", _CERTAINTY)]
    if frontier.mixed_reserved_bytes is not None:
        pairs.append(
            (
                "buckets",
                f"micro-batches of all values in one run reserve "
                f"{format_bytes(frontier.mixed_reserved_bytes)} of a budget of "
                f"{format_bytes(_budget(frontier))} (simulated, smallest first and then mixed)",
            )
        )
    pairs.append(("evidence", f"{_evidence(frontier)}, {frontier.seconds:.1f} s"))
    return Facts(tuple(pairs))


def _budget(frontier: FrontierRecord) -> int:
    return min(p.outcome.budget_bytes or 0 for p in frontier.points if p.outcome.fits)


def _evidence(frontier: FrontierRecord) -> str:
    kinds = {p.outcome.evidence for p in frontier.points if p.outcome.evidence is not None}
    return f"ceilings {' and '.join(sorted(kinds))}" if kinds else "nothing fits"


def _kind(point: FrontierPoint) -> str:
    return point.outcome.window.evidence if point.outcome.window is not None else "-"


def _points(frontier: FrontierRecord, fitting: list[FrontierPoint]) -> Table:
    measured = any(_kind(point) == "measured" for point in fitting)
    mark = "" if measured else "est. "
    with_buckets = frontier.mixed_reserved_bytes is not None
    return Table(
        columns=(
            printable(frontier.parameter),
            "micro-batch",
            "steps",
            "ceiling",
            "certainty",
            f"{mark}s/window",
            f"{mark}{frontier.unit}/s",
            *(("bucket",) if with_buckets else ()),
        ),
        align="rrrrrrr" + "r" * with_buckets,
        rows=tuple(
            (
                f"{point.value:,}",
                *_plan_cells(point.outcome, frontier.target, frontier.world_size),
                seconds_text(point.outcome.window),
                _pace_of(frontier, point),
                *(("-" if point.bucket is None else f"{point.bucket:,}",) if with_buckets else ()),
            )
            for point in fitting
        ),
    )


def _pace_of(frontier: FrontierRecord, point: FrontierPoint) -> str:
    pace = frontier.throughput(point)
    return "-" if pace is None else _figures(pace)
