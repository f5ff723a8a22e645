"""The ops and modules that allocate, and what for, as PyTorch's profiler sees them.

A dispatch mode would see them too, but changes what it sees: ATen takes its tensors for those of a
subclass, and runs out-of-place variants. Invariant: nothing about a run changes but its time.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from autobatch.devices.running_module import RunningModule
from autobatch.support.torch_private import ProfiledEvent, is_made_of_ops

__all__ = ["Made", "op_of_each_allocation"]

_MODULE = "autobatch module: "
_NODE = "autograd::engine::evaluate_function: "


class Made(NamedTuple):
    """What made an allocation, and what for.

    Attributes:
        op: the outermost op that runs a kernel: `aten::addmm` where the user calls `F.linear`;
            empty where no op did.
        module: as `RunningModule` names it.
        tensors: shape and dtype of the tensors in it that ops took, in the order of their use.
    """

    op: str
    module: str
    tensors: tuple[tuple[tuple[int, ...], torch.dtype], ...] = ()


@contextlib.contextmanager
def op_of_each_allocation(
    device: torch.device, running: RunningModule | None = None
) -> Iterator[list[Made]]:
    """Fill a list, at the end of the block, with what made each allocation on a device.

    Modules are named where `running` follows them in the block; they are empty otherwise.
    """
    made: list[Made] = []
    running = running or RunningModule(follows=False)
    running.announce = lambda name: torch.autograd.profiler.record_function(_MODULE + name)
    profiler = torch.autograd.profiler.profile(
        use_cpu=True, profile_memory=True, record_shapes=True
    )
    try:
        with profiler:
            yield made
    finally:
        running.announce = None
    reader = _Reader(device, running)
    reader.read(profiler.kineto_results.experimental_event_tree())  # type: ignore[union-attr]
    made += reader.made()


class _Reader:
    """Reads the profiler's events, which are trees in the order of time."""

    def __init__(self, device: torch.device, running: RunningModule) -> None:
        self._device = device
        self._running = running
        self._found: list[tuple[int, int, str, str]] = []  # time, allocation, op, module
        self._tensors: dict[int, dict[tuple[tuple[int, ...], torch.dtype], None]] = {}

    def read(self, events: Sequence[Any], inside: tuple[str, ...] = (), module: str = "") -> None:
        """Read events and what happened in them."""
        for event in events:
            kind, facts = event.typed
            around, at_work = inside, module
            if kind == ProfiledEvent.Allocation:
                if facts.device == self._device and facts.alloc_size > 0:  # else it is a free
                    op = next(filter(_runs_a_kernel, inside), "")
                    found = event.start_time_ns, facts.allocation_id, op, module
                    self._found.append(found)
            elif kind == ProfiledEvent.TorchOp:
                self._note_tensors(facts.inputs)
                around = (*inside, event.name)
                if event.name.startswith(_MODULE):
                    at_work = event.name.removeprefix(_MODULE)
                elif event.name.startswith(_NODE):
                    at_work = self._running.maker_of(facts.sequence_number)
            self.read(event.children, around, at_work)

    def _note_tensors(self, values: Sequence[Any]) -> None:
        for value in values:
            if isinstance(value, list):
                self._note_tensors(value)
            elif hasattr(value, "allocation_id"):
                seen = self._tensors.setdefault(value.allocation_id, {})
                seen[tuple(value.sizes), value.dtype] = None

    def made(self) -> Iterator[Made]:
        """Yield what made each allocation, in the order of time."""
        for _, allocation, op, module in sorted(self._found, key=lambda found: found[0]):
            yield Made(op, module, tuple(self._tensors.get(allocation, ())))


@functools.cache
def _runs_a_kernel(name: str) -> bool:
    """Whether the profiler's name is that of an op which is not made of others."""
    space, separator, op = name.partition("::")
    packet: Any = getattr(getattr(torch.ops, space, None), op, None) if separator else None
    overloads = packet.overloads() if hasattr(packet, "overloads") else []
    if not overloads:
        return False
    # the profiler leaves out which overload it is, and only odd ones differ from the main one
    main = "default" if "default" in overloads else overloads[0]
    return not is_made_of_ops(getattr(packet, main))
