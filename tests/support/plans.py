"""Realistic plans built without torch, for tests of the plan, the reports and the command line."""

from __future__ import annotations

import dataclasses
from typing import Any

from autobatch.gpus.catalogue import GpuSpec
from autobatch.plan.plan import Plan
from autobatch.records.evidence import MemoryPoint, ModelFacts, Timeline, TimelineSegment, Trial
from autobatch.records.footprint import Footprint
from autobatch.records.split import Split

MIB = 2**20

WEIGHTS = 497_759_232
SAVED_PER_SAMPLE = 211 * MIB
LOGITS_PER_SAMPLE = 98 * MIB
INPUTS_PER_SAMPLE = 16_384
WORKSPACE = 2 * 8_519_680
CONTEXT = 430 * MIB
GPU = GpuSpec(
    name="a100-40gb",
    capacity_bytes=42_298_834_944,
    compute_capability=(8, 0),
    context_bytes=CONTEXT,
    bandwidth_bytes_per_s=1_555_000_000_000,
    flops={"bf16": 312e12, "fp32": 19.5e12},
    sources={"capacity_bytes": "torch.cuda.get_device_properties", "flops": "vendor data sheet"},
)
HEADROOM = 0.05
BUDGET = int((GPU.capacity_bytes - CONTEXT) * (1 - HEADROOM))


def footprint_at(micro_batch: int, evidence: str = "simulated", steps: int = 4) -> Footprint:
    """Return the account of a GPT-2-like model at a micro-batch."""
    parts = {
        "parameters_bytes": WEIGHTS,
        "buffers_bytes": 12 * MIB,
        "gradients_bytes": WEIGHTS,
        "optimizer_bytes": 2 * WEIGHTS + 592,
        "activations_bytes": SAVED_PER_SAMPLE * micro_batch,
        "temporaries_bytes": LOGITS_PER_SAMPLE * micro_batch + 3 * MIB,
        "inputs_bytes": INPUTS_PER_SAMPLE * micro_batch,
        "workspace_bytes": WORKSPACE,
        "other_bytes": 0,
        "rounding_bytes": 1_231_872 + 512 * micro_batch,
    }
    allocated = sum(parts.values())
    return Footprint(
        micro_batch=micro_batch,
        accumulation_steps=steps,
        gpu=GPU.name,
        evidence=evidence,  # type: ignore[arg-type]
        **parts,
        peak_allocated_bytes=allocated,
        peak_reserved_bytes=_segments(allocated + 180 * MIB),
        context_bytes=CONTEXT,
    )


def timeline_at(micro_batch: int, steps: int = 4) -> Timeline:
    """Return two windows of rising and falling activations, as a trace would give them."""
    samples: list[TimelineSegment] = []
    marks: list[tuple[int, str, int, int]] = []
    resident = {"parameters": WEIGHTS, "buffers": 12 * MIB, "workspace": WORKSPACE}
    gradients = optimizer = event = 0
    reserved = 0

    def sample(activations: int, temporaries: int, inputs: int) -> None:
        nonlocal event, reserved
        categories = resident | {
            "gradients": gradients,
            "optimizer state": optimizer,
            "activations": activations,
            "temporaries": temporaries,
            "inputs": inputs,
            "other": 0,
        }
        allocated = sum(categories.values()) + MIB
        reserved = max(reserved, _segments(allocated + 180 * MIB))
        samples.append(
            TimelineSegment(
                event=event,
                categories=categories,
                allocated_bytes=allocated,
                reserved_bytes=reserved,
            )
        )
        event += 7

    marks.append((event, "setup", 0, 0))
    sample(0, 0, 0)
    saved, inputs = SAVED_PER_SAMPLE * micro_batch, INPUTS_PER_SAMPLE * micro_batch
    for window in range(2):
        for index in range(steps):
            marks.append((event, "forward", window, index))
            for part in range(1, 13):
                sample(
                    saved * part // 12, LOGITS_PER_SAMPLE * micro_batch * (part % 3) // 9, inputs
                )
            marks.append((event, "backward", window, index))
            for part in range(12, -1, -1):
                if index == 0:
                    gradients = WEIGHTS * (12 - part) // 12
                sample(saved * part // 12, LOGITS_PER_SAMPLE * micro_batch * part // 12, inputs)
        marks.append((event, "step", window, steps - 1))
        optimizer = 2 * WEIGHTS
        for part in (1, 3, 1):
            sample(0, WEIGHTS * part // 3, 0)
        gradients = 0
        sample(0, 0, 0)
    peak = max(samples, key=lambda segment: segment.allocated_bytes)
    return Timeline(samples=tuple(samples), marks=tuple(marks), peak_event=peak.event)


def example_plan(**changes: Any) -> Plan:
    """Return 64 × 4 on one A100 for GPT-2, or the same with some fields changed."""
    ceiling = max(n for n in range(1, 400) if footprint_at(n).peak_reserved_bytes <= BUDGET)
    plan = Plan(
        split=Split(target=256, windows=((64,) * 4,)),
        ceiling=ceiling,
        ceiling_at_least=ceiling,
        headroom=HEADROOM,
        budget_bytes=BUDGET,
        others_bytes=0,
        allowed_bytes=None,
        gpu=GPU,
        model=ModelFacts(
            name="GPT2LMHeadModel",
            parameters=124_439_808,
            trainable_parameters=124_439_808,
            batchnorm_layers=0,
            optimizer="AdamW",
            loss="output.loss",
            autocast="bf16",
            clip_norm=1.0,
            frozen=(),
            loss_code=None,
        ),
        footprint=footprint_at(64, "predicted"),
        ceiling_footprint=footprint_at(ceiling),
        trials=tuple(_trial(n) for n in (2, 3, ceiling)),
        curve=tuple(
            _point(n, "simulated" if n in (2, 3, ceiling) else "predicted")
            for n in (1, 2, 3, 4, 8, 16, 32, 48, 64, 80, 96, ceiling, ceiling + 1, ceiling + 16)
        ),
        timeline=timeline_at(64),
        peak_blocks=(),
        lives=None,
        most_bytes=None,
        sharding=None,
        levers=(),
        batch_dims=None,
        otherwise=None,
        method="trace model",
        warnings=(
            "loss.item() reads a stand-in value on the virtual GPU: code that branches on the loss "
            "may take another path; keep logging out of the probe.",
        ),
        notes=(),
        what_if=None,
        objective="largest",
        speed=(),
        loader_samples_per_s=None,
        versions={"autobatch": "0.1.0", "torch": "2.13.0+cpu", "python": "3.12.4"},
        created="2026-01-05T09:30:00+00:00",
        seconds=3.42,
    )
    return dataclasses.replace(plan, **changes)


def ragged_plan(target: int, windows: tuple[tuple[int, ...], ...], **model: Any) -> Plan:
    """Return the example with another split, and with some facts of the model changed."""
    plan = example_plan()
    return dataclasses.replace(
        plan,
        split=Split(target=target, windows=windows),
        footprint=footprint_at(max(map(max, windows)), "predicted", len(windows[0])),
        timeline=timeline_at(max(map(max, windows)), len(windows[0])),
        model=dataclasses.replace(plan.model, **model),
    )


def _segments(allocated_bytes: int) -> int:
    return -(-allocated_bytes // (2 * MIB)) * 2 * MIB


def _trial(micro_batch: int) -> Trial:
    footprint = footprint_at(micro_batch)
    return Trial(
        micro_batch=micro_batch,
        accumulation_steps=4,
        fits=True,
        oom=False,
        alloc_retries=0,
        peak_allocated_bytes=footprint.peak_allocated_bytes,
        peak_reserved_bytes=footprint.peak_reserved_bytes,
        seconds=0.8 + micro_batch / 1000,
        evidence="simulated",
    )


def _point(micro_batch: int, evidence: str) -> MemoryPoint:
    footprint = footprint_at(micro_batch)
    return MemoryPoint(
        micro_batch=micro_batch,
        peak_allocated_bytes=footprint.peak_allocated_bytes,
        peak_reserved_bytes=footprint.peak_reserved_bytes,
        evidence=evidence,  # type: ignore[arg-type]
    )
