"""The arithmetic of errors: pure functions over rows and what was predicted for them.

Invariant: errors are signed, (predicted - measured) / measured; positive is too much memory.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median, quantiles
from typing import Any, Literal

from autobatch.support.units import GIB, MIB
from reports.accuracy.tables import Row
from reports.common.journal import Record

Verdict = Literal["inside", "below", "above"]

CLOSE = 0.05
PERCENTILES = (1, 5, 10, 25, 50, 75, 90, 95, 99)
LARGE_BYTES = 2 * GIB
"""Below, what varies from one process to the next, and is in no allocator, hides the rest."""

FIRST_SIZE = 512
"""Where timm's search began: what ran there has no upper end."""

MANY_SIZES = 3
"""A line through fewer sizes would say nothing."""

_CONTEXTS_MIB = range(0, 4001, 25)
_ORIGINS = frozenset("tf legacy gluon ssl swsl ig dm nf ese test".split())


@dataclass(frozen=True, slots=True, kw_only=True)
class Peak:
    """A row with a measured and a predicted peak.

    Attributes:
        reserved_bytes: predicted, without the context.
        context_bytes: added to it.
    """

    row: Row
    reserved_bytes: int
    context_bytes: int
    measured_bytes: int

    @property
    def predicted_bytes(self) -> int:
        return self.reserved_bytes + self.context_bytes

    @property
    def error(self) -> float:
        return signed_error(self.predicted_bytes, self.measured_bytes)

    @property
    def needed(self) -> float:
        """What the run took, without the context, as a share of what was predicted, less 1."""
        return (self.measured_bytes - self.context_bytes) / self.reserved_bytes - 1

    @property
    def family(self) -> str:
        return family_of(self.row.run.model)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bracket:
    """A row with the largest size that ran, and a predicted ceiling."""

    row: Row
    ceiling: int

    @property
    def above(self) -> int | None:
        """The size that did not run; None where the first one of the search did."""
        ran = self.row.micro_batch
        return None if ran >= FIRST_SIZE else next_size_up(ran)

    @property
    def verdict(self) -> Verdict:
        return verdict_of(self.ceiling, self.row.micro_batch)

    @property
    def family(self) -> str:
        return family_of(self.row.run.model)


def signed_error(predicted: float, measured: float) -> float:
    """Return (predicted - measured) / measured.

    >>> signed_error(110, 100), signed_error(95, 100)
    (0.1, -0.05)
    """
    return (predicted - measured) / measured


def next_size_up(micro_batch: int) -> int:
    """Return the size that timm's search tried before this one: powers of two and 3/2 of them.

    >>> [next_size_up(n) for n in (1, 2, 3, 8, 24, 384)]
    [2, 3, 4, 12, 32, 512]
    """
    base = 1 << (micro_batch.bit_length() - 1)
    middle = base + base // 2
    return middle if micro_batch < middle else 2 * base


def verdict_of(ceiling: int, ran: int) -> Verdict:
    """Say where a ceiling lies: inside [ran, next size up) or not."""
    if ceiling < ran:
        return "below"
    return "inside" if ran >= FIRST_SIZE or ceiling < next_size_up(ran) else "above"


def family_of(model: str) -> str:
    """Return the family of a model by its name.

    The name ends at the first slash from the right; parts are separated by "_" or "-". Leading
    parts that name an origin (tf, legacy, gluon, ssl, swsl, ig, dm, nf, ese, test) are dropped.
    The family is the next part without a size in words (tiny, small, base, large) and without its
    depth: digits at the end with at most two letters after them, except for a version such as v2.

    >>> [family_of(name) for name in ("resnet50d", "tf_efficientnet_b2", "MobileNetV3Small")]
    ['resnet', 'efficientnet', 'mobilenetv3']
    """
    parts = re.split(r"[_-]", model.rpartition("/")[2].lower())
    while len(parts) > 1 and parts[0] in _ORIGINS:
        parts = parts[1:]
    first = re.sub(r"(?<=.)(tiny|small|base|large)$", "", parts[0])
    if re.search(r"v\d$", first):
        return first
    return re.sub(r"(?<=[a-z]{2})\d+[a-z]{0,2}$", "", first) or first


def percentile(values: Sequence[float], percent: int) -> float:
    """Interpolate a percentile linearly between order statistics."""
    if len(values) == 1:
        return values[0]
    return quantiles(values, n=100, method="inclusive")[percent - 1]


def statistics_of(errors: Sequence[float]) -> dict[str, Any]:
    """Summarise signed errors; the median, mean and percentile are of their sizes."""
    if not errors:
        return {"rows": 0}
    sizes = [abs(error) for error in errors]
    return {
        "rows": len(errors),
        "median": median(sizes),
        "mean": fmean(sizes),
        "p90": percentile(sizes, 90),
        "signed_median": median(errors),
        "under_predicted": fmean(error < 0 for error in errors),
        "within_5_percent": fmean(size <= CLOSE for size in sizes),
    }


def line(points: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """Return intercept and slope of the least-squares line."""
    xs, ys = zip(*points, strict=True)
    x_mean, y_mean = fmean(xs), fmean(ys)
    spread = sum((x - x_mean) ** 2 for x in xs)
    slope = sum((x - x_mean) * (y - y_mean) for x, y in zip(xs, ys, strict=True)) / spread
    return y_mean - slope * x_mean, slope


def residual_lines(peaks: Iterable[Peak]) -> list[dict[str, float]]:
    """Split what is missing (measured - predicted) into a constant part and one per sample.

    One line per run with at least `MANY_SIZES` sizes; the slope is given as a share of the
    predicted bytes per sample.
    """
    runs: dict[Any, list[Peak]] = defaultdict(list)
    for peak in peaks:
        runs[peak.row.run].append(peak)
    lines = []
    for found in runs.values():
        if len({peak.row.micro_batch for peak in found}) < MANY_SIZES:
            continue
        sizes = [peak.row.micro_batch for peak in found]
        missing = [peak.measured_bytes - peak.predicted_bytes for peak in found]
        constant, slope = line(zip(sizes, missing, strict=True))
        _, predicted = line(zip(sizes, (peak.predicted_bytes for peak in found), strict=True))
        if predicted:
            lines.append({"constant_mib": constant / MIB, "per_sample": slope / predicted})
    return lines


def by_family(peaks: Sequence[Peak]) -> dict[str, dict[str, Any]]:
    """Summarise each family, the most over-predicted first."""
    families: dict[str, list[Peak]] = defaultdict(list)
    for peak in peaks:
        families[peak.family].append(peak)
    found = {}
    for family, members in families.items():
        lines = residual_lines(members)
        found[family] = statistics_of([peak.error for peak in members]) | {
            "models": len({peak.row.run.model for peak in members}),
            "lowest": min(peak.error for peak in members),
            "highest": max(peak.error for peak in members),
            "missing_constant_mib": _median(line["constant_mib"] for line in lines),
            "missing_per_sample": _median(line["per_sample"] for line in lines),
        }
    return dict(sorted(found.items(), key=lambda item: -item[1]["signed_median"]))


def _median(values: Iterable[float]) -> float | None:
    known = list(values)
    return median(known) if known else None


def best_context(peaks: Sequence[Peak]) -> dict[str, Any]:
    """Return which one constant would make the mean error smallest, and the errors with it."""

    def errors(mib: int) -> list[float]:
        return [
            signed_error(peak.reserved_bytes + mib * MIB, peak.measured_bytes) for peak in peaks
        ]

    best = min(_CONTEXTS_MIB, key=lambda mib: fmean(map(abs, errors(mib))))
    found = statistics_of(errors(best))
    return {"mib": best} | {name: found[name] for name in ("median", "p90", "within_5_percent")}


def summarise_peaks(peaks: Sequence[Peak]) -> dict[str, Any]:
    """Summarise predicted and measured peaks; aggregates only."""
    if not peaks:
        return statistics_of([])
    summary = statistics_of([peak.error for peak in peaks])
    needed = [peak.needed for peak in peaks if peak.reserved_bytes >= LARGE_BYTES]
    return summary | {
        "best_context": best_context(peaks),
        "large_rows": len(needed),
        "needed": {str(p): percentile(needed, p) for p in PERCENTILES} if needed else {},
        "by_family": by_family(peaks),
    }


def summarise_brackets(brackets: Sequence[Bracket]) -> dict[str, Any]:
    """Count ceilings inside, below and above; aggregates only."""
    if not brackets:
        return {"rows": 0}
    families: dict[str, Counter[str]] = defaultdict(Counter)
    for bracket in brackets:
        families[bracket.family][bracket.verdict] += 1
    counted: Counter[str] = sum(families.values(), Counter())
    return {
        "rows": len(brackets),
        "inside": counted["inside"] / len(brackets),
        "below": counted["below"] / len(brackets),
        "above": counted["above"] / len(brackets),
        "by_family": {
            family: {name: found[name] for name in ("inside", "below", "above")}
            for family, found in sorted(families.items())
        },
    }


def peaks_of(
    rows: Iterable[Row], found: Mapping[str, Record], context: Callable[[Row], int]
) -> list[Peak]:
    """Join rows with their predictions, where there are both."""
    return [
        Peak(
            row=row,
            reserved_bytes=found[row.key]["reserved_bytes"],
            context_bytes=context(row),
            measured_bytes=row.measured_bytes,
        )
        for row in rows
        if row.measured_bytes is not None and "reserved_bytes" in found[row.key]
    ]


def brackets_of(rows: Iterable[Row], found: Mapping[str, Record]) -> list[Bracket]:
    """Join rows with their predicted ceilings, where there are any."""
    return [
        Bracket(row=row, ceiling=found[row.key]["ceiling"])
        for row in rows
        if "ceiling" in found[row.key]
    ]


def causes_of(rows: Iterable[Row], found: Mapping[str, Record]) -> dict[str, list[str]]:
    """Return the models without a prediction by cause."""
    causes: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        cause = found[row.key].get("error")
        if cause is not None:
            causes[cause].append(row.run.model)
    return dict(sorted(causes.items()))
