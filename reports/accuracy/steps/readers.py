"""Which reader understands which set of rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from reports.accuracy.steps.configuration import IncompleteError, Step, StepRow
from reports.accuracy.steps.course_runs import course_step
from reports.accuracy.steps.titan_runs import titan_step
from reports.accuracy.steps.transformers_runs import docs_step, tuning_step

READERS: Mapping[str, Callable[[StepRow], Step]] = {
    "cs336": course_step,
    "snapshots": course_step,
    "hf_docs": docs_step,
    "torchtitan": titan_step,
    "fms_acceleration": tuning_step,
}


def step_of(row: StepRow) -> Step:
    """Return the step that a row measured.

    Raises:
        IncompleteError: something that decides memory is not known.
    """
    reader = READERS.get(row["set"])
    if reader is None:
        raise IncompleteError(f"the set {row['set']!r} is of no known kind")
    if row["compile"] not in ("off", "", "none"):
        raise IncompleteError("compiled: its kernels are not simulated")
    return reader(row)
