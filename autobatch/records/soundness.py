"""What holds in every plan that a tuner writes, and what reports rely on.

Invariant: a plan that passes can be rendered in every format.
"""

from __future__ import annotations

from autobatch.records.codec import RecordError
from autobatch.records.evidence import SpeedPoint, Timeline, Trial
from autobatch.records.footprint import Footprint
from autobatch.records.plan_record import PlanRecord

__all__ = ["check_sound"]


def check_sound(plan: PlanRecord) -> None:
    """Refuse figures that no tuner writes and no report can render.

    Raises:
        RecordError: there are some; it says which rule they break.
    """
    for rule, holds in _rules(plan).items():
        if not holds:
            raise RecordError(rule)


def _rules(plan: PlanRecord) -> dict[str, bool]:
    """Return what must hold, as sentences, and whether it does."""
    windows = plan.split.windows
    footprints = (plan.footprint, plan.ceiling_footprint)
    rules = {
        "split.windows must hold sizes of at least 1, as many for each rank": (
            bool(windows)
            and len({len(window) for window in windows}) == 1
            and all(window and min(window) >= 1 for window in windows)
        ),
        "split.windows must sum to split.target": sum(map(sum, windows)) == plan.target,
        "gpu.capacity_bytes and budget_bytes must be positive": (
            plan.gpu.capacity_bytes > 0 and plan.budget_bytes > 0
        ),
        "headroom must be at least 0 and below 1": 0 <= plan.headroom < 1,
        "model.autocast must be bf16, fp16 or null": plan.model.autocast in (None, "bf16", "fp16"),
        "every ceiling must be at least 1": plan.ceiling_at_least >= 1
        and (plan.ceiling is None or plan.ceiling >= 1),
        "every micro_batch must be at least 1": (
            all(footprint.micro_batch >= 1 for footprint in footprints)
            and all(trial.micro_batch >= 1 for trial in plan.trials)
            and all(point.micro_batch >= 1 for point in plan.curve)
        ),
        "every footprint's categories must sum to its peak_allocated_bytes, above 0": all(
            sum(footprint.categories.values()) == footprint.peak_allocated_bytes > 0
            for footprint in footprints
        ),
        "every footprint's peak_reserved_bytes must be at least its peak_allocated_bytes": all(
            footprint.peak_reserved_bytes >= footprint.peak_allocated_bytes
            for footprint in footprints
        ),
        "every footprint must have both of low_device_bytes and high_device_bytes, in order, or "
        "neither": all(map(_has_range, footprints)),
        "every time of a trial must be above 0, with its window_range in order": all(
            map(_has_times, plan.trials)
        ),
        "every time of a split must be above 0": all(map(_takes_time, plan.speed)),
        "timeline must have both marks and samples, in order, or neither": _in_order(plan.timeline),
    }
    if plan.otherwise is not None:
        parts = plan.otherwise.categories
        rules["otherwise's categories must sum to its peak_allocated_bytes, above 0"] = (
            set(parts) == set(plan.footprint.categories)
            and sum(parts.values()) == plan.otherwise.peak_allocated_bytes > 0
        )
    return rules


def _has_range(footprint: Footprint) -> bool:
    low, high = footprint.low_device_bytes, footprint.high_device_bytes
    if low is None or high is None:
        return low is high
    return 0 <= low <= high


def _has_times(trial: Trial) -> bool:
    if trial.window_range is not None and not 0 < trial.window_range[0] <= trial.window_range[1]:
        return False
    return trial.window_seconds is None or trial.window_seconds > 0


def _takes_time(point: SpeedPoint) -> bool:
    return point.window_seconds > 0 and 0 < point.low <= point.high


def _in_order(timeline: Timeline) -> bool:
    begins = [event for event, *_ in timeline.marks]
    events = [sample.event for sample in timeline.samples]
    # both are left out of plans that were not drawn, and of those in a trainer's checkpoints
    is_whole = bool(begins) == bool(events)
    return is_whole and begins == sorted(begins) and events == sorted(events)
