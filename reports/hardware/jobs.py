"""Run the jobs of the report in child processes, within a budget of time.

Jobs on the card run one after the other; while one runs, the next child gets ready. What needs no
card, the virtual GPU, runs beside them. Invariant: no child outlives `run_jobs`, and what a child
that was ended had found out is kept.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reports.hardware.child import record_path
from reports.hardware.workloads import Case

JOB_S = {"measure": 75.0, "virtual": 120.0, "rivals": 90.0}
"""Seconds after which a child is ended."""

_TAIL_S = 25.0
"""Kept at the end for simulations that still run."""

_LEAST_S = 8.0
"""With less than this left, no job is begun."""

Say = Callable[[str], None]


@dataclass(slots=True)
class Child:
    """A process that waits for its line, or runs."""

    kind: str
    name: str
    folder: Path
    process: subprocess.Popen[bytes]
    began: float = 0.0

    def go(self) -> None:
        """Let it begin."""
        self.began = time.monotonic()
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died while it got ready
            self.process.stdin.write(b"go\n")
            self.process.stdin.close()

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        if self.process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self.process.stdin.close()

    def facts(self, ending: str | None) -> dict[str, Any]:
        """Return what it found out, and how it ended if not well."""
        path = record_path(self.folder, self.kind, self.name)
        facts: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"errors": []}
        facts["seconds"] = time.monotonic() - self.began
        if not facts.pop("finished", False):
            log = path.with_suffix(".log")
            last = (
                log.read_text(errors="replace").strip().splitlines()[-15:] if log.exists() else []
            )
            reason = ending or f"the process ended with code {self.process.returncode}"
            facts["errors"].append(
                {"stage": facts.get("stage"), "error": reason, "traceback": last}
            )
        facts.pop("stage", None)
        return facts


@dataclass(slots=True)
class Jobs:
    """What is under way.

    Attributes:
        command: starts a child; its kind, workload and folder are appended.
        found: by workload, what each kind of job found out.
        not_run: jobs that time did not allow, as "kind of workload".
    """

    command: Sequence[str]
    folder: Path
    deadline: float
    say: Say
    beside: int
    found: dict[str, dict[str, Any]] = field(default_factory=dict)
    not_run: list[str] = field(default_factory=list)
    simulations: list[str] = field(default_factory=list)
    running: list[Child] = field(default_factory=list)

    def ready(self, kind: str, name: str) -> Child:
        """Start a child, which gets ready."""
        environment = dict(os.environ)
        if kind == "virtual":
            environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        log = record_path(self.folder, kind, name).with_suffix(".log")
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*self.command, kind, name, str(self.folder)],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                env=environment,
            )
        return Child(kind, name, self.folder, process)

    def keep(self, child: Child, ending: str | None = None) -> None:
        facts = child.facts(ending)
        self.found.setdefault(child.name, {})[child.kind] = facts
        errors = "".join(f"; {error['error']}" for error in facts["errors"])
        self.say(f"{child.kind} {child.name}: {facts['seconds']:.0f} s{errors}")

    def simulate(self) -> None:
        """Collect simulations that are done, and begin waiting ones where there is room."""
        for child in list(self.running):
            over = time.monotonic() - child.began > JOB_S["virtual"]
            if child.process.poll() is None and not over:
                continue
            child.end()
            self.running.remove(child)
            self.keep(child, f"ended after {JOB_S['virtual']:.0f} s" if over else None)
        while self.simulations and len(self.running) < self.beside:
            child = self.ready("virtual", self.simulations.pop(0))
            child.go()
            self.running.append(child)

    def wait(self, child: Child, limit_s: float) -> str | None:
        """Wait for a child on the card; return why it was ended, if it was."""
        while child.process.poll() is None:
            if time.monotonic() - child.began > limit_s:
                child.end()
                return f"ended after {limit_s:.0f} s"
            self.simulate()
            time.sleep(0.05)
        child.end()
        return None


def run_jobs(
    cases: Sequence[Case],
    *,
    command: Sequence[str],
    folder: Path,
    seconds: float,
    say: Say,
    saved: Callable[[Jobs], None],
) -> Jobs:
    """Measure, simulate and compare as many cases as time allows.

    Args:
        cases: the most important first.
        command: starts a child.
        folder: for what the children leave.
        seconds: for everything.
        say: told of each job that is done.
        saved: called after each job on the card.
    """
    beside = max(1, (os.cpu_count() or 1) // 4)
    jobs = Jobs(command, folder, time.monotonic() + seconds, say, beside)
    plan = [("measure", case.name) for case in cases]
    plan += [("rivals", case.name) for case in cases if case.compares]
    with _ended(jobs) as waiting:
        for place, (kind, name) in enumerate(plan):
            left = jobs.deadline - time.monotonic() - min(_TAIL_S, seconds / 4)
            if left < _LEAST_S:
                jobs.not_run += [f"{kind} of {name}" for kind, name in plan[place:]]
                break
            child = waiting.pop() if waiting else jobs.ready(kind, name)
            if kind == "rivals" and not _ceiling(jobs, name):
                child.end()
                jobs.not_run.append(f"rivals of {name}")
            else:
                child.go()
            if place + 1 < len(plan):
                waiting.append(jobs.ready(*plan[place + 1]))
            if child.began:
                ending = jobs.wait(child, min(left, JOB_S[kind]))
                jobs.keep(child, ending)
                if kind == "measure" and _ceiling(jobs, name):
                    jobs.simulations.append(name)
                saved(jobs)
        while (jobs.running or jobs.simulations) and time.monotonic() < jobs.deadline:
            jobs.simulate()
            time.sleep(0.05)
        for child in jobs.running:
            child.end()
            jobs.keep(child, "ended: the time was up")
        jobs.running.clear()
        jobs.not_run += [f"virtual of {name}" for name in jobs.simulations]
    saved(jobs)
    return jobs


def _ceiling(jobs: Jobs, name: str) -> int:
    """Return the measured ceiling of a workload; 0 where there is none."""
    ceiling = jobs.found.get(name, {}).get("measure", {}).get("ceiling", {})
    return int(ceiling.get("micro_batch", 0))


@contextlib.contextmanager
def _ended(jobs: Jobs) -> Iterator[list[Child]]:
    """Give a place for the child that waits, and end every child on the way out."""
    waiting: list[Child] = []
    try:
        yield waiting
    finally:
        for child in (*waiting, *jobs.running):
            child.end()
