"""What a plan has to agree with, each figure from a source that shares nothing with the plan.

Invariant: every check can fail, and says both figures.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from autobatch.devices.virtual.gpu import VirtualGpu
from autobatch.memory.trace import Trace
from autobatch.plan.plan import Plan
from autobatch.workload.workload import Workload
from reports.common.journal import Record
from reports.zoo.entries import Step
from reports.zoo.on_cpu import OnCpu, on_cpu, storage_bytes

TOLERANCE = Fraction(1, 100)
"""Share by which activations and optimizer state may differ from the CPU's."""

BOUND = Fraction(1, 4)
"""Share by which an upper bound may be above what ran on the CPU."""

FLOOR_BYTES = 8192
"""Scalars, states of random generators: what the CPU holds and a GPU does not, and the reverse."""


@dataclass(frozen=True, slots=True)
class Check:
    """One comparison: what was expected, what the plan or its simulation says."""

    name: str
    expected: int
    found: int
    passes: bool
    note: str = ""

    def record(self) -> Record:
        facts: Record = {
            "check": self.name,
            "expected": self.expected,
            "found": self.found,
            "passes": self.passes,
        }
        return facts | ({"note": self.note} if self.note else {})


def exact(name: str, expected: int, found: int) -> Check:
    """Compare two figures that have to be equal."""
    return Check(name, expected, found, expected == found)


def close(name: str, expected: int, found: int, note: str = "") -> Check:
    """Compare two figures that may differ by `TOLERANCE`."""
    allowed = max(TOLERANCE * max(abs(expected), abs(found)), FLOOR_BYTES)
    return Check(name, expected, found, abs(expected - found) <= allowed, note)


def bound(name: str, expected: int, found: int, note: str = "") -> Check:
    """Compare an upper bound with what it bounds."""
    passes = (1 - TOLERANCE) * expected <= found <= (1 + BOUND) * expected
    return Check(name, expected, found, passes, note)


def weights(step: Step, plan: Plan) -> list[Check]:
    """Compare parameters and buffers with the bytes of the user's own tensors."""
    held = plan.ceiling_footprint
    model = step.model
    return [
        exact(
            "parameters", storage_bytes([*model.parameters(), *step.learned]), held.parameters_bytes
        ),
        exact("buffers", storage_bytes(model.buffers()), held.buffers_bytes),
    ]


def state_of(step: Step, trace: Trace, ran: OnCpu | None) -> list[Check]:
    """Compare the optimizer's state with that of a real step, or with what its paper says."""
    found = trace.by_category(len(trace.events) - 1)["optimizer_state"]
    if isinstance(step.state, float):
        trained = [p for p in (*step.model.parameters(), *step.learned) if p.requires_grad]
        return [close("optimizer", round(step.state * storage_bytes(trained)), found, "arithmetic")]
    if ran is None or ran.state_bytes is None or step.state is not None:
        return []
    return [close("optimizer", ran.state_bytes, found, "a step on the CPU")]


def ceiling(plan: Plan, workload: Workload, device: VirtualGpu) -> tuple[list[Check], Trace]:
    """Execute the ceiling and the size above it: n fits, n + 1 does not.

    Returns:
        The checks, and the trace at the ceiling.
    """
    steps = 1 if plan.target <= plan.world_size else 2
    size = plan.ceiling_at_least
    at = device.run(workload, micro_batch=size, accumulation_steps=steps)
    found = [
        Check(
            "ceiling fits",
            plan.budget_bytes,
            at.replay.peak_reserved_bytes,
            at.fits(plan.budget_bytes),
        )
    ]
    limit = workload.sample_limit
    if plan.ceiling is not None and (limit is None or size < limit):
        above = device.run(workload, micro_batch=size + 1, accumulation_steps=steps)
        found.append(
            Check(
                "one more does not",
                plan.budget_bytes,
                above.replay.peak_reserved_bytes,
                not above.fits(plan.budget_bytes),
            )
        )
    return found, at.trace


def simulated(workload: Workload, device: VirtualGpu, sizes: Iterable[int]) -> dict[int, int]:
    """Return the activations that a simulated forward pass leaves, without autocast, by size."""
    plain = replace(workload, autocast=None, evaluate=None)
    return {
        size: forward_bytes(device.run(plain, micro_batch=size, accumulation_steps=1).trace)
        for size in sizes
    }


def activations(
    found: Mapping[int, int], ran: Sequence[OnCpu], size: int, *, bounded: bool = False
) -> Iterator[Check]:
    """Compare what the forward pass leaves: at the sizes that ran on the CPU, and at the ceiling.

    Args:
        found: what was simulated, by size.
        ran: on the CPU, at as many sizes as the bytes have terms in the micro-batch.
        size: the ceiling, for which the CPU's figures are continued.
        bounded: whether the simulation takes an upper bound of what runs.
    """
    compare, name = (bound, "upper bound") if bounded else (close, "activations")
    for real in ran:
        n = real.micro_batch
        yield compare(name, real.alive_bytes, found[n], f"n = {n}")
    if len(ran) > 1:
        yield compare("slope", continued(ran, size), found[size], f"n = {size}")


def forward_bytes(trace: Trace) -> int:
    """Return the activations that are alive when the first backward pass begins."""
    end = next(mark.event for mark in trace.marks if mark.phase == "backward")
    return trace.by_category(end - 1)["activations"]


def continued(ran: Sequence[OnCpu], size: int) -> int:
    """Continue the polynomial through the CPU's figures to another size."""
    total = Fraction(0)
    for here in ran:
        term = Fraction(here.alive_bytes)
        for other in ran:
            if other is not here:
                term *= Fraction(size - other.micro_batch, here.micro_batch - other.micro_batch)
        total += term
    return round(total)


def real_runs(step: Step, workload: Workload) -> list[OnCpu]:
    """Run the sizes that a step asks for on the CPU, the first of them to the optimizer's step."""
    assert not isinstance(step.on_cpu, str)
    torch.manual_seed(0)
    first, *others = step.on_cpu
    forward = []
    for size in others:
        with _state_kept(workload.model):
            forward.append(on_cpu(workload, size, step=False))
    return [on_cpu(workload, first, step=True), *forward]


@contextmanager
def _state_kept(model: nn.Module) -> Iterator[None]:
    """Put parameters and buffers back, so that a model does again what it does at first."""
    held = [*model.parameters(), *model.buffers()]
    before = [tensor.detach().clone() for tensor in held]
    yield
    with torch.no_grad():
        for tensor, value in zip(held, before, strict=True):
            tensor.copy_(value)


class Untouched:
    """What a model was before the plan, to compare it with what it is afterwards."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._before = self._values(copied=True)
        self._random = torch.get_rng_state()

    def _values(self, *, copied: bool = False) -> dict[str, Any]:
        tensors = {**dict(self._model.named_parameters()), **dict(self._model.named_buffers())}
        values: dict[str, Any] = {
            name: value.detach().clone() if copied else value for name, value in tensors.items()
        }
        modes = {f"{name} trains": module.training for name, module in self._model.named_modules()}
        return values | modes

    def check(self) -> Check:
        """Count what differs."""
        now = self._values()
        changed = [name for name, value in self._before.items() if not _same(value, now.get(name))]
        changed += [n for n, p in self._model.named_parameters() if p.grad is not None]
        changed += [name for name in now if name not in self._before]
        if not torch.equal(self._random, torch.get_rng_state()):
            changed.append("random state")
        return Check("untouched", 0, len(changed), not changed, ", ".join(changed[:3]))


def _same(before: Any, now: Any) -> bool:
    if not isinstance(before, Tensor):
        return bool(before == now)
    if before.is_meta or before.is_sparse:
        return type(now) is type(before) or isinstance(now, type(before))
    if type(before) is not Tensor and type(before) is not torch.nn.Parameter:
        return type(before) is type(now)
    try:
        return torch.equal(before, now.detach()) or bool((before.isnan() & now.isnan()).any())
    except (RuntimeError, NotImplementedError):
        return bool((before == now).all())
