"""The ops and modules that allocate, as PyTorch's profiler sees them.

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
    """What made an allocation.

    Attributes:
        op: the outermost op that runs a kernel: `aten::addmm` where the user calls `F.linear`;
            empty where no op did.
        module: as `RunningModule` names it.
    """

    op: str
    module: str


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
    profiler = torch.autograd.profiler.profile(use_cpu=True, profile_memory=True)
    try:
        with profiler:
            yield made
    finally:
        running.announce = None
    tree = profiler.kineto_results.experimental_event_tree()  # type: ignore[union-attr]
    found = sorted(_allocations(tree, (), "", device, running), key=lambda pair: pair[0])
    made += [each for _, each in found]


def _allocations(
    events: Sequence[Any],
    inside: tuple[str, ...],
    module: str,
    device: torch.device,
    running: RunningModule,
) -> Iterator[tuple[int, Made]]:
    """Yield the time and the maker of each allocation among events and what happened in them."""
    for event in events:
        kind, facts = event.typed
        is_allocation = kind == ProfiledEvent.Allocation and facts.device == device
        if is_allocation and facts.alloc_size > 0:  # a free has a negative size
            op = next(filter(_runs_a_kernel, inside), "")
            yield event.start_time_ns, Made(op, module)
        around, at_work = inside, module
        if kind == ProfiledEvent.TorchOp:
            around = (*inside, event.name)
            if event.name.startswith(_MODULE):
                at_work = event.name.removeprefix(_MODULE)
            elif event.name.startswith(_NODE):
                at_work = running.maker_of(facts.sequence_number)
        yield from _allocations(event.children, around, at_work, device, running)


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
