"""From what callers of `tune`, `predict` and the rest give to a workload and checked numbers."""

from __future__ import annotations

from dataclasses import replace
from numbers import Integral
from typing import Any

from autobatch.devices.choose import Gpu, built
from autobatch.devices.preserve import one_at_a_time
from autobatch.errors import UsageError
from autobatch.records.split import split
from autobatch.support.exits import exits_reported
from autobatch.support.wording import argument
from autobatch.tuning.planning import LARGEST
from autobatch.workload.complete import Asked, WorkloadOptions
from autobatch.workload.workload import Workload

__all__ = ["checked_target", "stated", "whole", "workload_of"]


def workload_of(asked: Asked, gpu: Gpu) -> Workload:
    """Build the model where a function does, and complete what was asked.

    Raises:
        UsageError: an argument cannot be understood; the subclass says which kind.
        WorkloadError: the function failed.
    """
    with one_at_a_time(), exits_reported("building the model, or trying it,"):
        return replace(asked, model=built(asked.model, gpu)).workload()


def whole(value: Any) -> Any:
    """Return a whole number of another library, such as `numpy.int64`, as Python's own."""
    is_whole = isinstance(value, Integral) and not isinstance(value, bool)
    return int(value) if is_whole else value


def checked_target(target: Any, world_size: int, headroom: float | None) -> int:
    """Return an effective batch as Python's own number, before anything is built or run.

    Raises:
        UsageError: the target cannot be split, or a headroom is given that is not in [0, 1).
    """
    target = whole(target)
    split(target, ceiling=LARGEST, world_size=world_size)
    is_share = isinstance(headroom, (int, float)) and 0 <= headroom < 1
    if headroom is not None and not is_share:
        raise UsageError(
            f"{argument('headroom')} is {headroom!r}: use a share of at least 0 and below 1"
        )
    return target  # type: ignore[no-any-return]


def stated(options: WorkloadOptions) -> WorkloadOptions:
    """Return the options without those that are None, which mean the Workload's own."""
    return {name: value for name, value in options.items() if value is not None}  # type: ignore[return-value]
