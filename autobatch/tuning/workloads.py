"""From what callers of `tune`, `predict` and `advise` give to a workload and whole numbers."""

from __future__ import annotations

from dataclasses import replace
from numbers import Integral
from typing import Any

from autobatch.devices.choose import Gpu, built
from autobatch.devices.preserve import one_at_a_time
from autobatch.errors import UsageError
from autobatch.support.exits import exits_reported
from autobatch.support.wording import argument
from autobatch.workload.complete import Asked
from autobatch.workload.workload import Workload

__all__ = ["require_share", "whole", "workload_of"]


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


def require_share(headroom: float) -> None:
    """Refuse a headroom that is no share.

    Raises:
        UsageError: it is not in [0, 1).
    """
    if not isinstance(headroom, (int, float)) or not 0 <= headroom < 1:
        raise UsageError(
            f"{argument('headroom')} is {headroom!r}: use a share of at least 0 and below 1"
        )
