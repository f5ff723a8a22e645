"""What a comparison of cards says, and the frontier of a parameter: plain records.

Invariant: what is known of a choice is a plan's (`Outcome`), and its seconds are an estimate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from autobatch.gpus.catalogue import GpuSpec
from autobatch.records.codec import decode, dump_json, encode, parse_versioned
from autobatch.records.footprint import Evidence

__all__ = [
    "ComparedCard",
    "ComparisonRecord",
    "FrontierPoint",
    "FrontierRecord",
    "Outcome",
    "WindowTime",
    "read_record",
    "write_record",
]

SCHEMA_VERSION = 1

_MILLION = 1_000_000
_HOUR = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowTime:
    """The time of one training window: estimated by a roofline, or measured on the GPU.

    Attributes:
        seconds: of one window, on all GPUs that share it.
        low, high: what it takes four times out of five; None where it was measured.
        bound: what most of an estimate goes to, such as "compute" or "memory".
        evidence: "estimate" or "measured".
    """

    seconds: float
    low: float | None = None
    high: float | None = None
    bound: str | None = None
    evidence: Literal["estimate", "measured"] = "estimate"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What `tune` finds for one configuration: a plan in short, or why there is none.

    Attributes:
        ceiling: largest micro-batch that fits; None where the search stopped at its upper limit,
            and where none fits.
        ceiling_at_least: largest micro-batch known to fit; 0 where none does.
        micro_batch: of the plan, which makes the target exactly; None where nothing fits.
        accumulation_steps: of the plan; None where nothing fits.
        budget_bytes: what the run may reserve on one card; None where it failed before that.
        peak_reserved_bytes: of the planned window; of the smallest that was tried, where none fits.
        tried_micro_batch: that smallest one; None where there is a plan.
        evidence: how the ceiling is known; None where nothing fits.
        likelihood: how likely the planned micro-batch is to fit a real card; None where it ran on
            one, and where nothing fits.
        ceiling_likelihood: the same of the ceiling.
        window: its time; None where the card's speed is not known, and where nothing fits.
        failure: what failed in one line, where there is neither a plan nor a shortage of memory.
    """

    ceiling: int | None = None
    ceiling_at_least: int = 0
    micro_batch: int | None = None
    accumulation_steps: int | None = None
    budget_bytes: int | None = None
    peak_reserved_bytes: int | None = None
    tried_micro_batch: int | None = None
    evidence: Evidence | None = None
    likelihood: float | None = None
    ceiling_likelihood: float | None = None
    window: WindowTime | None = None
    failure: str | None = None

    @property
    def fits(self) -> bool:
        """Whether there is a plan."""
        return self.micro_batch is not None

    @property
    def short_bytes(self) -> int | None:
        """Bytes by which the smallest window misses the budget; None where that is not why."""
        if self.fits or self.budget_bytes is None or self.peak_reserved_bytes is None:
            return None
        return self.peak_reserved_bytes - self.budget_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedCard:
    """One card of a comparison.

    Attributes:
        gpu: the card.
        outcome: what `tune` finds on it.
        price_per_hour: of one such card, in whatever currency prices were given in; None where none
            was given.
        cost_per_million: what a million samples cost by the estimated time, on all GPUs; None
            without a price or an estimate.
    """

    gpu: GpuSpec
    outcome: Outcome
    price_per_hour: float | None = None
    cost_per_million: float | None = None

    @classmethod
    def of(
        cls,
        gpu: GpuSpec,
        outcome: Outcome,
        price_per_hour: float | None,
        *,
        target: int,
        world_size: int,
    ) -> ComparedCard:
        """Return a card with its cost: the hours of a million samples, on all GPUs, at its price.

        >>> outcome = Outcome(micro_batch=50, window=WindowTime(seconds=0.36))
        >>> card = GpuSpec(name="card", capacity_bytes=1)
        >>> ComparedCard.of(card, outcome, 2.0, target=100, world_size=2).cost_per_million
        4.0
        """
        cost = None
        if price_per_hour is not None and outcome.window is not None:
            hours = outcome.window.seconds * _MILLION / target / _HOUR
            cost = hours * price_per_hour * world_size
        return cls(gpu=gpu, outcome=outcome, price_per_hour=price_per_hour, cost_per_million=cost)


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparisonRecord:
    """The same training on several cards.

    Attributes:
        model: class name of the module.
        parameters: number of elements of all of its parameters.
        target: effective batch: samples of one update over all GPUs.
        world_size: GPUs that share it.
        sharding: "ddp", "fsdp" or "custom"; None for a single GPU.
        headroom: share of the usable memory that stays free.
        cards: as they were given.
        smallest_card: name of the smallest card of the catalogue on which one micro-batch fits;
            None where all of the cards fit, and where none in the catalogue does.
        executions: windows that were simulated for all cards together.
        warnings: what the user must act on, one line each.
        notes: what was inferred or assumed, one line each.
        versions: of autobatch, torch and Python.
        created: when, in UTC.
        seconds: wall time of the comparison.
    """

    model: str
    parameters: int
    target: int
    world_size: int
    sharding: Literal["ddp", "fsdp", "custom"] | None
    headroom: float
    cards: tuple[ComparedCard, ...]
    smallest_card: str | None
    executions: int
    warnings: tuple[str, ...]
    notes: tuple[str, ...]
    versions: Mapping[str, str]
    created: str
    seconds: float

    @property
    def fitting(self) -> tuple[ComparedCard, ...]:
        """The cards that there is a plan for, in order."""
        return tuple(card for card in self.cards if card.outcome.fits)

    @property
    def fastest(self) -> ComparedCard | None:
        """The card with the fewest estimated seconds a window; None without estimates."""
        windows = [(card.outcome.window, index) for index, card in enumerate(self.cards)]
        known = [(window.seconds, index) for window, index in windows if window is not None]
        return self.cards[min(known)[1]] if known else None

    @property
    def cheapest(self) -> ComparedCard | None:
        """The card with the least estimated cost of a million samples; None without prices."""
        costs = [(card.cost_per_million, index) for index, card in enumerate(self.cards)]
        known = [(cost, index) for cost, index in costs if cost is not None]
        return self.cards[min(known)[1]] if known else None


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontierPoint:
    """One value of a parameter.

    Attributes:
        value: of the parameter.
        outcome: what `tune` finds with it.
        tokens_per_sample: tokens of one sample; None where samples are not sequences of them.
        bucket: samples of a micro-batch of this size where all sizes are trained in one run; None
            where there is no plan, and where the model is another for each value.
    """

    value: int
    outcome: Outcome
    tokens_per_sample: int | None = None
    bucket: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontierRecord:
    """The largest micro-batch along a parameter, on one card.

    Attributes:
        parameter: its name, such as "seq".
        model: class name of the module.
        gpu: the card.
        target: effective batch: samples of one update over all GPUs.
        world_size: GPUs that share it.
        headroom: share of the usable memory that stays free.
        points: by value, the smallest first.
        mixed_reserved_bytes: what micro-batches of all buckets reserve in one run, simulated; None
            where there are no buckets.
        warnings: what the user must act on, one line each.
        notes: what was inferred or assumed, one line each.
        versions: of autobatch, torch and Python.
        created: when, in UTC.
        seconds: wall time of it all.
    """

    parameter: str
    model: str
    gpu: GpuSpec
    target: int
    world_size: int
    headroom: float
    points: tuple[FrontierPoint, ...]
    mixed_reserved_bytes: int | None
    warnings: tuple[str, ...]
    notes: tuple[str, ...]
    versions: Mapping[str, str]
    created: str
    seconds: float

    @property
    def unit(self) -> Literal["tokens", "samples"]:
        """What is counted in a second: tokens where samples are sequences of them."""
        is_text = any(point.tokens_per_sample is not None for point in self.points)
        return "tokens" if is_text else "samples"

    def throughput(self, point: FrontierPoint) -> float | None:
        """Return tokens or samples a second at a point; None where its time is not known."""
        window = point.outcome.window
        if window is None:
            return None
        each = (point.tokens_per_sample or 1) if self.unit == "tokens" else 1
        return self.target * each / window.seconds


def write_record(kind: type[ComparisonRecord | FrontierRecord], record: object) -> str:
    """Render the fields of a record of `kind`, or of what extends it, as JSON text.

    Raises:
        RecordError: a number is not finite.
    """
    values = {each.name: encode(getattr(record, each.name)) for each in fields(kind)}
    return dump_json({"schema_version": SCHEMA_VERSION, **values})


def read_record(kind: type[ComparisonRecord | FrontierRecord], text: str) -> dict[str, Any]:
    """Return the fields of a record of `kind`, by name, from the text of `write_record`.

    Raises:
        RecordError: the text is no such record of this schema.
    """
    record = decode(kind, parse_versioned(text, SCHEMA_VERSION))
    return {each.name: getattr(record, each.name) for each in fields(kind)}
