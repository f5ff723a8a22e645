"""Everything that is measured of one workload on the card."""

from __future__ import annotations

import copy
import pickle
import time
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from autobatch.devices.base import Run
from autobatch.devices.cuda.gpu import CudaGpu
from autobatch.errors import AutobatchError
from autobatch.memory.accounting import footprint_of
from autobatch.memory.alignment import Misaligned
from autobatch.memory.replay import Replay, simulate
from autobatch.memory.trace import Phase
from autobatch.memory.trace_model import TraceModel
from autobatch.records.progress import Progress
from autobatch.tuning.ceiling import Ceiling, find_ceiling
from autobatch.tuning.probe import Probe
from autobatch.workload.loss import DefaultLoss
from autobatch.workload.training_window import Training, run_windows
from autobatch.workload.tree import map_tensors
from autobatch.workload.workload import Workload
from reports.hardware.bench import Bench
from reports.hardware.findings import Findings
from reports.hardware.virtual import LIMIT, STEPS, ceiling_within, peaks

SMALL = (2, 3)
_ROUNDS = 4


class Trials:
    """Keeps every trial of a probe, with the stage that it ran in and what the driver saw."""

    def __init__(self, bench: Bench, findings: Findings):
        self._watch, self._findings = bench.watch, findings
        self.rows: list[dict[str, Any]] = []
        findings["trials"] = self.rows

    def __call__(self, progress: Progress) -> None:
        if progress.trial is None:
            self._watch.reset()
            return
        seen = {"stage": self._findings["stage"], "nvml_used_bytes": self._watch.peak_bytes}
        self.rows.append(asdict(progress.trial) | seen)
        self._findings.save()


def measure(
    workload: Workload, bench: Bench, findings: Findings, *, traces: Path, times_recording: bool
) -> None:
    """Find the ceiling, prove it, compare the model's word with it, and trace ops.

    Traces are pickled into `traces`: one file for each executed size, and `labelled-<size>.pickle`.
    """
    device = CudaGpu(bench.card)
    trials = Trials(bench, findings)
    probe = Probe(
        device=device, workload=workload, accumulation_steps=STEPS, progress=trials, headroom=0.0
    )
    found: Ceiling | None = None
    with device.hosting(workload):
        with findings.stage("ceiling"):
            found = _search(probe, findings)
        if found is not None and found.micro_batch:
            with findings.stage("proof"):
                _prove(probe, found, findings)
            with findings.stage("small"):  # what these two alone would have foretold
                for size in SMALL:
                    if size <= found.micro_batch:
                        probe.run(size)
            with findings.stage("middle"):
                if found.micro_batch // 2 > max(SMALL):
                    probe.run(found.micro_batch // 2)
            with findings.stage("extrapolation"):
                findings["extrapolation"] = extrapolation(probe, found)
                findings["footprint"] = _footprint(probe, found.micro_batch)
        findings["remarks"] = list(device.notes())
        findings["context_bytes"] = device.spec.context_bytes
        findings["others_bytes"] = device.others_bytes
        findings["nvml_before_bytes"] = bench.watch.before_bytes
    with findings.stage("labelled"):
        middle = found.micro_batch // 2 if found is not None else 0
        findings["labelled"] = [
            _labelled(workload, bench, probe.runs[size], traces)
            for size in (SMALL[0], middle)
            if size in probe.runs
        ]
    for size, run in probe.runs.items():
        _keep(run, traces / f"{size}.pickle")
    if times_recording and found is not None and found.micro_batch:
        with findings.stage("recording"):
            findings["recording"] = recording_cost(workload, bench, max(2, found.micro_batch // 4))


def _search(probe: Probe, findings: Findings) -> Ceiling:
    """Find the ceiling as `tune` does."""
    started = time.perf_counter()
    found = find_ceiling(probe, LIMIT, foresee=lambda: _foreseen(probe))
    findings["ceiling"] = {
        "micro_batch": found.micro_batch,
        "limit_reached": found.limit_reached,
        "method": found.method,
        "reason": found.reason,
        "confirmed": found.micro_batch in probe.runs and probe.fits(found.micro_batch),
        "executions": len(probe.trials),
        "ooms": sum(trial.oom for trial in probe.trials),
        "alloc_retries": sum(trial.alloc_retries for trial in probe.trials),
        "seconds": time.perf_counter() - started,
        "budget_bytes": probe.budget_bytes,
        "warnings": list(dict.fromkeys(w for run in probe.runs.values() for w in run.notes)),
    }
    return found


def _foreseen(probe: Probe) -> Ceiling | None:
    spec = replace(probe.device.spec, context_bytes=0)
    try:
        return ceiling_within(spec, probe.budget_bytes, probe.workload)
    except AutobatchError:
        return None


def _prove(probe: Probe, found: Ceiling, findings: Findings) -> None:
    """Execute the size above the ceiling; where it fits after all, let the search go on from it."""
    if found.limit_reached:
        return
    above = found.micro_batch + 1
    fits = probe.fits(above)
    findings["proof"] = {"micro_batch": above, "fits": fits, "oom": probe.trials[-1].oom}
    if fits:
        better = find_ceiling(probe, LIMIT, prove=True)
        findings["proof"]["ceiling_after_all"] = better.micro_batch


def extrapolation(probe: Probe, found: Ceiling) -> dict[str, Any]:
    """Compare what each size that ran through without a retry took with what was foretold of it.

    `foretold` is from the two small sizes alone, `refitted` from the model of the whole search,
    `replayed` from the size's own trace: its error is the simulated allocator's.
    """
    runs = {size: run for size, run in probe.runs.items() if run.replay.fits}
    small: TraceModel | None = None
    reason = None
    try:
        small = TraceModel.fit([runs[size].trace for size in SMALL], kernels_may_vary=True)
    except (Misaligned, KeyError) as error:
        reason = str(error)
    rows = []
    for size, run in sorted(runs.items()):
        row = {"micro_batch": size, "measured": peaks(run.replay)}
        row["replayed"] = peaks(_replayed(probe, run))
        for name, model in (("foretold", small), ("refitted", found.model)):
            row[name] = None if model is None else peaks(probe.predict(model, size))
        rows.append(row)
    return {"aligned": small is not None, "reason": reason, "sizes": rows}


def _replayed(probe: Probe, run: Run) -> Replay:
    trace = run.trace
    allocator = probe.device.allocator()
    return simulate(trace.sizes, trace.events, allocator=allocator, streams=trace.streams)


def _footprint(probe: Probe, size: int) -> dict[str, Any]:
    run = probe.run(size)
    spec = probe.device.spec
    footprint = footprint_of(run.trace, run.replay, spec, "measured", simulated=False)
    return dict(footprint.categories)


def _labelled(workload: Workload, bench: Bench, plain: Run, traces: Path) -> dict[str, Any]:
    """Trace a size once more, with the op of every allocation."""
    device = CudaGpu(bench.card, labelled=True)
    with device.hosting(workload):
        size = plain.trace.micro_batch
        run = device.run(workload, micro_batch=size, accumulation_steps=STEPS)
    _keep(run, traces / f"labelled-{size}.pickle")
    trace = run.trace
    return {
        "micro_batch": size,
        "blocks": len(trace.blocks),
        "events": len(trace.events),
        "without_op": sum(not block.op for block in trace.blocks if block.phase != "setup"),
        "seconds": run.seconds,
        "shortage": run.shortage,
        "same_as_unlabelled": (trace.sizes, trace.events)
        == (plain.trace.sizes, plain.trace.events),
    }


def _keep(run: Run, path: Path) -> None:
    if run.shortage is None:
        path.write_bytes(pickle.dumps(run.trace))


class NoPhases:
    """Is told where a run is, and does nothing about it."""

    def begin(self, phase: Phase, window: int = 0, micro_batch: int = 0) -> None:
        pass

    def ended(self) -> None:
        pass


class PlainTraining:
    """The same windows without a probe around them."""

    def __init__(self, workload: Workload, device: torch.device):
        self.workload, self.device = workload, device
        self.model = copy.deepcopy(workload.model).to(device).train()
        make: Any = workload.optimizer
        self.optimizer = make(list(self.model.parameters()))

    def windows(self, micro_batch: int, windows: int) -> None:
        """Run training windows."""
        run_plain(self.workload, self.model, self.optimizer, self.device, micro_batch, windows)


def run_plain(
    workload: Workload,
    model: torch.nn.Module,
    optimizer: Any,
    device: torch.device,
    micro_batch: int,
    windows: int,
) -> None:
    """Run training windows of a workload over objects that are on the device."""

    def batch() -> Any:
        return map_tensors(lambda tensor: tensor.to(device), workload.batch(micro_batch))

    run_windows(
        Training(
            workload=workload,
            model=model,
            optimizers=[optimizer],
            given=optimizer,
            loss=workload.loss or DefaultLoss(),
            batch=batch,
            accumulation_steps=STEPS,
            windows=windows,
            phases=NoPhases(),
        )
    )


def recording_cost(workload: Workload, bench: Bench, micro_batch: int) -> dict[str, Any]:
    """Time windows with PyTorch's memory history on and off, in turns."""
    card = bench.card
    training = PlainTraining(workload, card.device)
    training.windows(micro_batch, 2)
    seconds: dict[str, list[float]] = {"off": [], "on": []}
    for _ in range(_ROUNDS):
        clock = card.clock()
        training.windows(micro_batch, 1)
        seconds["off"].append(clock.seconds())
        with card.recording():
            clock = card.clock()
            training.windows(micro_batch, 1)
            seconds["on"].append(clock.seconds())
    return {
        "micro_batch": micro_batch,
        "window_seconds_off": median(seconds["off"]),
        "window_seconds_on": median(seconds["on"]),
        "rounds": seconds,
    }
