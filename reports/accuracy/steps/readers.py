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


_UNWRITTEN = {
    "litgpt": "litgpt's own model, adapters and merged LoRA layers are not written anew in this "
    "report, and the peak is over a run of lengths that are not published",
    "fsdp_qlora": "the script's own loading, LoRA layers and bitsandbytes' 4-bit kernels are not "
    "written anew in this report",
}


def step_of(row: StepRow) -> Step:
    """Return the step that a row measured.

    Raises:
        IncompleteError: something that decides memory is not known.
    """
    if row["set"] in _UNWRITTEN:
        raise IncompleteError(_UNWRITTEN[row["set"]])
    reader = READERS.get(row["set"])
    if reader is None:
        raise IncompleteError(f"the set {row['set']!r} is of no known kind")
    if row["compile"] not in ("off", "", "none"):
        raise IncompleteError("compiled: its kernels are not simulated")
    return reader(row)
