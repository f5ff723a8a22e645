"""What the virtual GPU says of the card that was measured."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from autobatch.devices.cuda.gpu import describe
from autobatch.devices.virtual.gpu import VirtualGpu
from autobatch.gpus.catalogue import GpuSpec
from autobatch.memory.accounting import footprint_of
from autobatch.memory.replay import Replay
from autobatch.memory.trace import Trace
from autobatch.records.progress import silent
from autobatch.tuning.ceiling import Ceiling, find_ceiling
from autobatch.tuning.probe import Probe
from autobatch.workload.workload import Workload
from reports.common.alignment import summary
from reports.hardware.findings import Findings

LIMIT = 2**16
"""Largest micro-batch that a search looks at."""

STEPS = 2
"""Micro-batches in a window."""


def peaks(replay: Replay) -> dict[str, int]:
    return {
        "allocated_bytes": replay.peak_allocated_bytes,
        "reserved_bytes": replay.peak_reserved_bytes,
    }


def probe_within(spec: GpuSpec, budget_bytes: int, workload: Workload) -> Probe:
    """Return a probe of a virtual card of which a run may reserve so much."""
    context_bytes = max(spec.capacity_bytes - budget_bytes, 0)
    return Probe(
        device=VirtualGpu(replace(spec, context_bytes=context_bytes)),
        workload=workload,
        accumulation_steps=STEPS,
        progress=silent,
        headroom=0.0,
    )


def ceiling_within(spec: GpuSpec, budget_bytes: int, workload: Workload) -> Ceiling:
    """Return the ceiling on a virtual card of which a run may reserve so much."""
    return find_ceiling(probe_within(spec, budget_bytes, workload), LIMIT)


def simulate_all(
    workload: Workload, measured: dict[str, Any], real: Sequence[Trace], findings: Findings
) -> None:
    """Predict every size that was measured, and align the traces that name their ops."""
    card = measured["card"]
    major, minor = card["compute_capability"]
    spec = describe(card["name"], card["capacity_bytes"], (major, minor))
    probe = probe_within(spec, measured["ceiling"]["budget_bytes"], workload)
    findings["assumed_context_bytes"] = spec.context_bytes
    with findings.stage("ceiling"):
        started = time.perf_counter()
        found = find_ceiling(probe, LIMIT)
        findings["ceiling"] = {
            "micro_batch": found.micro_batch,
            "method": found.method,
            "reason": found.reason,
            "executions": len(probe.trials),
            "seconds": time.perf_counter() - started,
            "warnings": list(dict.fromkeys(w for r in probe.runs.values() for w in r.notes)),
        }
    with findings.stage("sizes"):
        trials = measured["trials"]
        sizes = sorted(
            {t["micro_batch"] for t in trials if not t["oom"] and not t["alloc_retries"]}
        )
        findings["sizes"] = [
            {"micro_batch": size} | peaks(_replay(probe, found, size)) for size in sizes
        ]
        run = probe.run(measured["ceiling"]["micro_batch"])
        footprint = footprint_of(run.trace, run.replay, spec, "simulated", simulated=True)
        findings["footprint"] = dict(footprint.categories)
    with findings.stage("alignment"):
        findings["alignments"] = [
            {"micro_batch": trace.micro_batch} | summary(trace, probe.run(trace.micro_batch).trace)
            for trace in real
        ]


def _replay(probe: Probe, found: Ceiling, size: int) -> Replay:
    if size in probe.runs or found.model is None:
        return probe.run(size).replay
    return probe.predict(found.model, size)
