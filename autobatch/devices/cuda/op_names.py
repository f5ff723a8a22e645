"""The ops that allocate, as PyTorch's profiler sees them.

A dispatch mode would see them too, but changes what it sees: ATen takes its tensors for those of a
subclass, and runs out-of-place variants. Invariant: nothing about a run changes but its time.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from autobatch.support.torch_private import ProfiledEvent, is_made_of_ops

__all__ = ["op_of_each_allocation"]


@contextlib.contextmanager
def op_of_each_allocation(device: torch.device) -> Iterator[list[str]]:
    """Fill a list, at the end of the block, with the op of each allocation on a device.

    An op is the outermost one that runs a kernel: `aten::addmm` where the user calls
    `F.linear`. What no op allocates has an empty name.
    """
    ops: list[str] = []
    profiler = torch.autograd.profiler.profile(use_cpu=True, profile_memory=True)
    with profiler:
        yield ops
    tree = profiler.kineto_results.experimental_event_tree()  # type: ignore[union-attr]
    found = sorted(_allocations(tree, (), device), key=lambda pair: pair[0])
    ops += [op for _, op in found]


def _allocations(
    events: Sequence[Any], inside: tuple[str, ...], device: torch.device
) -> Iterator[tuple[int, str]]:
    """Yield the time and the op of each allocation among events and what happened within them."""
    for event in events:
        kind, facts = event.typed
        is_allocation = kind == ProfiledEvent.Allocation and facts.device == device
        if is_allocation and facts.alloc_size > 0:  # a free has a negative size
            yield event.start_time_ns, next(filter(_runs_a_kernel, inside), "")
        is_op = kind == ProfiledEvent.TorchOp
        yield from _allocations(event.children, (*inside, event.name) if is_op else inside, device)


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
