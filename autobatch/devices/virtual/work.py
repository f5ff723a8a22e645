"""The work of a simulated run: what every op of its last training window computes and moves.

What one call costs is in `kernels/costs.py`, and what counts of the host in `host_copies.py`.
Copies of a batch are left out, because loaders make them meanwhile.

Invariant: a run that is not counted is the same as ever: its mode has no part of this.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from autobatch.devices.virtual.fake_mode import VirtualMode
from autobatch.devices.virtual.host_copies import HostCopies
from autobatch.devices.virtual.kernels.costs import costs_of, traits_of
from autobatch.devices.virtual.recorder import StorageRecorder
from autobatch.gpus.work import Collective, Communication, OpWork, WindowWork, Work
from autobatch.memory.trace import Phase
from autobatch.support.patching import patched
from autobatch.support.torch_private import FakeTensor, OpOverload

__all__ = ["WorkCounter", "counting"]

_COLLECTIVES: Mapping[str, Collective] = {
    "_allgather_base_": "all_gather",
    "allgather_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "all_gather_into_tensor": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "reduce_scatter_tensor": "reduce_scatter",
    "allreduce_": "all_reduce",
    "allreduce_coalesced_": "all_reduce",
    "all_reduce": "all_reduce",
    "all_reduce_": "all_reduce",
    "alltoall_base_": "all_to_all",
    "all_to_all_single": "all_to_all",
    "broadcast_": "broadcast",
    "broadcast": "broadcast",
}
"""By name of the op in `c10d` and `_c10d_functional`; tensor parallel layers use the latter."""

_COPIES = ("_to_copy", "copy_")
"""Ops that may copy from the host, in which no kernel of the card runs."""

_TO_COPY = torch.ops.aten._to_copy.default

Part = tuple[Phase, int]


@dataclass(slots=True)
class _Calls:
    """What was counted in one part of a window."""

    ops: list[OpWork] = field(default_factory=list)
    communication: list[Communication] = field(default_factory=list)

    def work(self) -> Work:
        return Work.of(self.ops, self.communication)


class WorkCounter:
    """Counts the ops of the last training window of a run."""

    def __init__(
        self, recorder: StorageRecorder, device: torch.device, world_size: int, windows: int
    ):
        """Count what runs on a device while a recorder's phases are those of a window.

        Args:
            recorder: told which phase runs.
            device: the simulated one.
            world_size: ranks of a collective that does not show how many it has.
            windows: of the run.
        """
        self._recorder = recorder
        self._device = device
        self._world_size = world_size
        self._last = windows - 1
        self._costs: dict[int, list[OpWork]] = {}
        self._parts: dict[Part, _Calls] = {}
        self._calls: _Calls | None = None
        self._averages: list[Communication] = []
        self._host = HostCopies(recorder, device)

    @contextlib.contextmanager
    def following(self, buckets: Sequence[Tensor] = ()) -> Iterator[None]:
        """Follow the phases of the recorder.

        Args:
            buckets: in which gradients are averaged over ranks that hold whole copies. They are
                averaged once a window, while its last backward pass runs.
        """
        begin = self._recorder.begin
        self._averages = [
            Communication(
                collective="all_reduce",
                bytes=float(bucket.nbytes),
                ranks=self._world_size,
                overlaps=True,
            )
            for bucket in buckets
            if self._world_size > 1
        ]

        def begins(phase: Phase, window: int = 0, micro_batch: int = 0) -> None:
            begin(phase, window, micro_batch)
            self._begin(phase, window, micro_batch)

        with patched(self._recorder, begin=begins):
            yield

    def _begin(self, phase: Phase, window: int, micro_batch: int) -> None:
        if window != self._last or phase not in ("forward", "backward", "step"):
            self._calls = None
            return
        key = (phase, 0 if phase == "step" else min(micro_batch, 1))
        if phase == "step":  # several optimizers
            self._calls = self._parts.setdefault(key, _Calls())
        else:  # of several micro-batches after the first, the last counts
            self._calls = self._parts[key] = _Calls()

    def work(self, samples: int) -> WindowWork | None:
        """Return what the last window did; None where no window has run."""
        parts = {key: calls.work() for key, calls in self._parts.items()}
        if ("forward", 0) not in parts:
            return None
        return WindowWork(
            samples=samples,
            forward=parts["forward", 0],
            backward=parts.get(("backward", 0), Work()),
            later_forward=parts.get(("forward", 1)),
            later_backward=parts.get(("backward", 1)),
            update=parts.get(("step", 0), Work()),
            averages=tuple(self._averages),
        )

    def count(
        self,
        func: OpOverload,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        output: Any,
        known: object | None,
    ) -> None:
        """Count one call of an op, with its result.

        `known` is the same object for calls with arguments of the same layouts, which cost the
        same, or None.
        """
        of_host: list[Communication] = []
        if known is None or func is _TO_COPY:  # any other that is known is of the card alone
            of_host = self._host.followed(func, args, kwargs, output)
        calls = self._calls
        if calls is None or self._recorder.is_muted:
            return
        calls.communication.extend(of_host)
        if known is not None and (costs := self._costs.get(id(known))) is not None:
            calls.ops.extend(costs)
            return
        if func.namespace in ("c10d", "_c10d_functional"):
            self._communicates(func, args, output)
            return
        costs = self._costs_of(func, args, kwargs, output)
        if known is not None:
            self._costs[id(known)] = costs
        calls.ops.extend(costs)

    def _costs_of(
        self, func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any
    ) -> list[OpWork]:
        traits = traits_of(func)
        if traits.is_free:
            return []
        named = {**dict(zip(traits.names, args, strict=False)), **kwargs}
        inputs = {name: self._here(value) for name, value in named.items()}
        results = self._here(output) if traits.makes_new else []
        if not results and not any(inputs[name] for name in traits.written if name in inputs):
            return []
        if traits.name in _COPIES and not any(
            tensors for name, tensors in inputs.items() if name not in traits.written
        ):
            return []  # from the host
        return costs_of(func, traits, named, inputs, results, output)

    def _here(self, value: Any) -> list[Tensor]:
        """Return the tensors of a value that are on the device: of DTensors, their local parts."""
        if isinstance(value, (list, tuple)):
            return [tensor for item in value for tensor in self._here(item)]
        value = getattr(value, "_local_tensor", value)
        if isinstance(value, FakeTensor) and value.fake_device == self._device:
            return [value]
        return []

    def _communicates(self, func: OpOverload, args: Sequence[Any], output: Any) -> None:
        collective = _COLLECTIVES.get(func._opname)
        if collective is None or self._calls is None:
            return
        if func.namespace == "c10d":
            made, given = (_total(self._here(value)) for value in (*args, None)[:2])
            if func._opname in ("allreduce_", "allreduce_coalesced_", "broadcast_"):
                given = made
        else:
            given, made = _total(self._here(args[0])), _total(self._here(output))
        whole, part = max(given, made), max(min(given, made), 1)
        splits = collective in ("all_gather", "reduce_scatter")
        self._calls.communication.append(
            Communication(
                collective=collective,
                bytes=float(whole),
                ranks=max(round(whole / part), 1) if splits else self._world_size,
                overlaps=func.namespace == "c10d",
            )
        )


def counting(mode_class: type[VirtualMode], counter: WorkCounter) -> Callable[..., VirtualMode]:
    """Return what makes a mode that has every op counted that it answers, and is else the same."""

    class CountingMode(mode_class):  # type: ignore[misc, valid-type]
        _known: object | None = None

        def _dispatch(
            self, func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]
        ) -> Any:
            self._known = None
            output = super()._dispatch(func, args, kwargs)
            if output is not NotImplemented:
                counter.count(func, args, kwargs, output, self._known)
            return output

        def _repeated(self, known: object, *call: Any) -> Any:
            self._known = known
            return super()._repeated(known, *call)

    return CountingMode


def _total(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
