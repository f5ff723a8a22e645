"""What `tune` finds for one configuration, in short: shared by `compare` and `vary`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from autobatch.errors import AutobatchError, DoesNotFitError
from autobatch.plan.plan import Plan
from autobatch.records.comparison import Outcome, WindowTime
from autobatch.records.plan_record import Objective
from autobatch.records.progress import Progress, ProgressCallback
from autobatch.tuning.planning import plan_of
from autobatch.tuning.probe import Probe
from autobatch.tuning.speed import SpeedModel

__all__ = ["Told", "first_error", "measured_window", "outcome_of", "shared_warnings", "window_of"]

_EXPECTED = 2
"""Executions of most searches, for the progress that is shown."""


def outcome_of(
    probe: Probe, target: int, objective: Objective = "largest"
) -> tuple[Plan | None, Outcome]:
    """Return the plan of a probe and what it says in short; no plan where nothing fits.

    Raises:
        UsageError: the target cannot be divided over the GPUs, or the objective is about time and
            the speed of the card is not known.
        WorkloadError: the model, loss or optimizer failed.
    """
    try:
        plan = plan_of(probe, target=target, objective=objective)
    except DoesNotFitError:
        smallest = min(probe.runs)
        return None, Outcome(
            budget_bytes=probe.budget_bytes,
            peak_reserved_bytes=probe.runs[smallest].replay.peak_reserved_bytes,
            tried_micro_batch=smallest,
        )
    return plan, Outcome(
        ceiling=plan.ceiling,
        ceiling_at_least=plan.ceiling_at_least,
        micro_batch=plan.micro_batch,
        accumulation_steps=plan.accumulation_steps,
        budget_bytes=plan.budget_bytes,
        peak_reserved_bytes=plan.footprint.peak_reserved_bytes,
        evidence=plan.ceiling_footprint.evidence,
        likelihood=plan.likelihood,
        ceiling_likelihood=plan.ceiling_likelihood,
    )


def window_of(probe: Probe, plan: Plan) -> WindowTime | None:
    """Return the time of a planned window: measured where it ran on the card, else estimated.

    None where it was not measured, or the speed of the card is not known.

    Raises:
        WorkloadError: the probe's runs were not counted, and the workload failed as one was.
    """
    if not probe.device.is_simulated:
        return measured_window(plan)
    speed = SpeedModel.of_runs(probe.workload, plan.gpu, probe.runs)
    found = speed.estimate(plan.micro_batch, plan.accumulation_steps)
    if found is None:
        return None
    return WindowTime(seconds=found.seconds, low=found.low, high=found.high, bound=found.bound)


def measured_window(plan: Plan) -> WindowTime | None:
    """Return the measured time of a window, in proportion to its micro-batches."""
    for trial in reversed(plan.trials):
        if trial.micro_batch == plan.micro_batch and trial.window_seconds is not None:
            each = trial.window_seconds / trial.accumulation_steps
            return WindowTime(seconds=each * plan.accumulation_steps, evidence="measured")
    return None


class Told:
    """Passes on the progress of one search after the other, each with its name."""

    def __init__(self, progress: ProgressCallback, searches: int) -> None:
        """Begin with the first of so many searches."""
        self._progress = progress
        self._expected = _EXPECTED * searches
        self._before = self._latest = 0
        self._name = ""

    def begin(self, name: str) -> None:
        """Go on to the search of this name."""
        self._name, self._before = name, self._latest

    def __call__(self, step: Progress) -> None:
        """Tell of a step of the search."""
        done = self._before + step.executions
        self._latest = max(self._latest, done)
        self._progress(
            Progress(
                step=f"{self._name}: {step.step}",
                executions=done,
                expected=max(self._expected, done + 1),
                micro_batch=step.micro_batch,
                trial=step.trial,
            )
        )


def shared_warnings(warnings: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """Return what all plans warn of once, and the rest with the names that it is for.

    >>> shared_warnings({"t4": ("a", "b"), "l4": ("a", "b", "c"), "a30": ("a", "c")})
    ('a', 't4, l4: b', 'l4, a30: c')
    """
    counted = Counter(warning for each in warnings.values() for warning in dict.fromkeys(each))
    return tuple(
        warning
        if times == len(warnings)
        else f"{', '.join(name for name, each in warnings.items() if warning in each)}: {warning}"
        for warning, times in counted.items()
    )


def first_error(errors: Sequence[AutobatchError], of: int) -> None:
    """Raise the first error where every one of `of` configurations failed."""
    if errors and len(errors) == of:
        raise errors[0]
