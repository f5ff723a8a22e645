"""Plan one workload, check the plan, and note what that took.

Invariant: whatever a workload raises ends up in its record; only a crash of the process does not.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from autobatch.devices.base import Run
from autobatch.devices.virtual.gpu import VirtualGpu
from autobatch.plan.plan import Plan
from autobatch.support.patching import patched
from autobatch.workload.workload import Workload
from reports.common.journal import Record
from reports.common.results import one_line, versions
from reports.zoo import checks
from reports.zoo.entries import Entry, Step
from reports.zoo.on_cpu import OnCpu

SKIPPED, NOT_BUILT, FAILED, PLANNED = "skipped", "not built", "failed", "planned"


def attempt(entry: Entry) -> Record:
    """Return the record of a workload."""
    found = versions(*entry.packages)
    record: Record = {
        "key": entry.name,
        "area": entry.area,
        "what": entry.what,
        "packages": {name: found[name] for name in entry.packages},
    }
    missing = [name for name in entry.packages if found[name] is None]
    if missing:
        return record | {"outcome": SKIPPED, "reason": f"not installed: {', '.join(missing)}"}
    try:
        step = entry.make()
    except ImportError as error:
        return record | {"outcome": SKIPPED, "reason": one_line(error)}
    except Exception as error:
        return record | {"outcome": NOT_BUILT, "reason": one_line(error), "frames": _frames(error)}
    return record | _tried(step)


def _tried(step: Step) -> Record:
    untouched = checks.Untouched(step.model)
    with _observed() as seen:
        started = time.perf_counter()
        try:
            plan = step.plan()
        except Exception as error:
            return {
                "outcome": FAILED,
                "seconds": round(time.perf_counter() - started, 1),
                "reason": one_line(error),
                "frames": _frames(error),
            }
        seconds = time.perf_counter() - started
    record = _described(plan) | {"seconds": round(seconds, 1)}
    try:
        return record | _checked(step, plan, seen[-1], untouched)
    except Exception as error:  # a plan that cannot be checked is not known to be right
        return record | {
            "verdict": "unchecked",
            "reason": one_line(error),
            "frames": _frames(error),
        }


def _described(plan: Plan) -> Record:
    return {
        "outcome": PLANNED,
        "gpu": plan.gpu.name,
        "target": plan.target,
        "micro_batch": plan.micro_batch,
        "accumulation_steps": plan.accumulation_steps,
        "ceiling": plan.ceiling,
        "ceiling_at_least": plan.ceiling_at_least,
        "method": plan.method,
        "executions": plan.executions,
        "allocated_bytes": plan.footprint.peak_allocated_bytes,
        "optimizer": plan.model.optimizer,
        "autocast": plan.model.autocast,
        "warnings": list(plan.warnings),
    }


def _checked(
    step: Step, plan: Plan, seen: tuple[VirtualGpu, Workload], untouched: checks.Untouched
) -> Record:
    """Return what the checks found, and the verdict: right where all of them pass."""
    device, workload = seen
    found = [untouched.check(), *checks.weights(step, plan)]
    more, trace = checks.ceiling(plan, workload, device)
    found += more
    real: list[OnCpu] = []
    why = step.on_cpu if isinstance(step.on_cpu, str) else None
    if why is None:
        size = plan.ceiling_at_least
        # before anything runs for real, which may leave its traces in the user's objects
        left = checks.simulated(workload, device, {*map(int, step.on_cpu), size})
        try:
            real = checks.real_runs(step, workload)
        except Exception as error:
            why = f"the step fails on the CPU: {one_line(error)}"
        else:
            found += checks.activations(left, real, size, bounded=step.bounded)
    found += checks.state_of(step, trace, real[0] if real else None)
    wrong = [check for check in found if not check.passes]
    record: Record = {
        "verdict": "wrong" if wrong else "right",
        "checks": [check.record() for check in found],
        "on_cpu": [
            {"micro_batch": r.micro_batch, "alive": r.alive_bytes, "saved": r.saved_bytes}
            for r in real
        ],
    }
    if wrong:
        record["reason"] = "; ".join(
            f"{c.name}{f' ({c.note})' if c.note else ''}: {c.found:,} for {c.expected:,}"
            for c in wrong
        )
    return record | ({} if why is None else {"not_on_cpu": why})


@contextmanager
def _observed() -> Iterator[list[tuple[VirtualGpu, Workload]]]:
    """Note the workload that is simulated, whichever way it came.

    Runs of a number of windows are those of batches of all shapes, one after the other.
    """
    seen: list[tuple[VirtualGpu, Workload]] = []
    original = VirtualGpu.run

    def run(self: VirtualGpu, workload: Workload, **options: Any) -> Run:
        if "windows" not in options:
            seen[:] = [(self, workload)]
        return original(self, workload, **options)

    with patched(VirtualGpu, run=run):
        yield seen


def _frames(error: BaseException) -> list[str]:
    """Return the innermost calls of the first error in a chain, without folders of this machine."""
    while error.__cause__ is not None:
        error = error.__cause__
    calls = traceback.extract_tb(error.__traceback__)[-6:]
    return [f"{_home(call.filename)}:{call.lineno} {call.name}" for call in calls]


def _home(path: str) -> str:
    for part in ("site-packages/", "/reports/", "/autobatch/"):
        _, found, rest = path.rpartition(part)
        if found:
            return f"{part.strip('/')}/{rest}".removeprefix("site-packages/")
    return path.rpartition("/")[2]
