"""A GPU that is not in the machine: the user's own code on fake tensors, in seconds.

Forward and backward run through PyTorch's real autograd engine and optimizers; only kernels and
memory are missing. Invariant: the user's model, optimizer and random states are as before.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from autobatch.devices.base import WINDOWS, Run
from autobatch.devices.copies import Copier
from autobatch.devices.preserve import process_state_preserved
from autobatch.devices.session import Session, user_errors
from autobatch.devices.virtual.backend import pretend, virtual_device
from autobatch.devices.virtual.device_guard import lost_errors_found
from autobatch.devices.virtual.fake_mode import VirtualMode
from autobatch.devices.virtual.function_mode import CudaCalls
from autobatch.devices.virtual.kernels import fused, rnn
from autobatch.devices.virtual.kernels import outputs as norms
from autobatch.devices.virtual.kernels.cuda_functions import cuda_kernels
from autobatch.devices.virtual.kernels.workspaces import (
    contiguous_copies,
    convolution_workspaces,
    cublas_workspace_bytes,
    takes_workspace,
    uses_cublas,
)
from autobatch.devices.virtual.known_values import KnownValues
from autobatch.devices.virtual.recorder import StorageRecorder
from autobatch.devices.virtual.unknown_values import UnknownValues
from autobatch.gpus.catalogue import GpuSpec
from autobatch.gpus.uncertainty import SIMULATED_HEADROOM
from autobatch.memory.accounting import replay
from autobatch.memory.allocator import CachingAllocator
from autobatch.memory.allocator_settings import AllocatorSettings
from autobatch.memory.trace import Category, Phase
from autobatch.records.footprint import Evidence
from autobatch.support.torch_private import FakeTensor
from autobatch.workload.workload import Workload
from autobatch.workload.wrappers import is_compiled, unwrapped

__all__ = ["VirtualGpu"]

_KERNELS: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.log_sigmoid_forward.default: fused.log_sigmoid,
    torch.ops.aten.native_layer_norm_backward.default: norms.layer_norm_backward,
    torch.ops.aten.native_batch_norm.default: norms.batch_norm,
    torch.ops.aten.native_batch_norm_backward.default: norms.batch_norm_backward,
    torch.ops.aten._cudnn_rnn.default: rnn.forward_outputs,
    torch.ops.aten._cudnn_rnn_backward.default: rnn.backward_outputs,
}


@dataclass(frozen=True, slots=True)
class _Part:
    """What runs where: alone, unless told otherwise; the parts of a rank are in `sharding.py`."""

    device: torch.device
    recorder: StorageRecorder = field(default_factory=StorageRecorder)
    mode: type[VirtualMode] = VirtualMode
    shard: Callable[[nn.Module, Workload, Any], list[str]] = lambda model, workload, policy: []


class VirtualGpu:
    """Runs workloads on a simulated GPU."""

    evidence: Evidence = "simulated"
    is_simulated = True
    default_headroom = SIMULATED_HEADROOM
    scratch_varies = False
    must_run_the_plan = False

    def __init__(self, spec: GpuSpec):
        """Simulate the card that `spec` describes."""
        self.spec = spec
        self.usable_bytes = spec.capacity_bytes - spec.context_bytes
        self.others_bytes = 0
        self.allowed_bytes = None
        self._settings = AllocatorSettings.of_environment()
        self._recipes: dict[Any, Any] = {}

    def require(self, workload: Workload) -> None:
        """Accept every workload."""

    def host_limit_bytes(self) -> int | None:
        """Return None: fake tensors take no memory."""
        return None

    def simulated(self) -> None:
        """Return None: this is a simulated card."""

    def allocator(self) -> CachingAllocator:
        """Return an allocator that holds nothing yet."""
        return CachingAllocator(self._settings)

    @contextlib.contextmanager
    def hosting(self, workload: Workload) -> Iterator[None]:
        """Nothing needs room."""
        yield

    def notes(self) -> tuple[str, ...]:
        """Say nothing: a simulated card has no neighbours."""
        return ()

    def run(self, workload: Workload, *, micro_batch: int, accumulation_steps: int) -> Run:
        """Run two training windows of `accumulation_steps` micro-batches without a GPU.

        Raises:
            WorkloadError: the user's model, loss or optimizer failed; the cause is chained.
        """
        device = virtual_device()
        if not workload.is_sharded:
            return self._run(workload, micro_batch, accumulation_steps, _Part(device))
        from autobatch.devices.virtual.sharding.dtensor_mode import rank_mode
        from autobatch.devices.virtual.sharding.policy import sharded
        from autobatch.devices.virtual.sharding.rank import as_rank_zero

        with as_rank_zero(workload.world_size, device) as recorder:
            part = _Part(device, recorder, rank_mode(), sharded)
            return self._run(workload, micro_batch, accumulation_steps, part)

    def _run(
        self, workload: Workload, micro_batch: int, accumulation_steps: int, part: _Part
    ) -> Run:
        started = time.perf_counter()
        device, recorder = part.device, part.recorder
        notes: list[str] = []
        values = KnownValues(micro_batch)
        unknown = UnknownValues(_KERNELS, values)
        workspaces = _Workspaces(recorder, self.spec, device)
        copier = Copier(device, values.blank)
        mode = part.mode(device, recorder, unknown, workspaces.before, copier.move, self._recipes)
        calls = CudaCalls(device)
        original = unwrapped(workload.model)
        with (
            process_state_preserved(),
            pretend(self.spec, device),
            torch.compiler.set_stance("force_eager"),
            # an engine that has run before we registered has no thread for our device
            torch.autograd.set_multithreading_enabled(False),
            cuda_kernels(device, self.spec.compute_capability),
            mode,
            calls,
            calls.in_backward(),
            user_errors(workload, micro_batch),
            lost_errors_found(),
        ):

            def wrapped(copied: nn.Module) -> nn.Module:
                notes.extend(part.shard(copied, workload, copier.any(workload.sharding)))
                return copied

            session = Session(workload, original, device, copier, workspaces, wrapped)
            session.train(micro_batch, accumulation_steps, windows=WINDOWS)
        notes.extend(_shape_notes(unknown))
        if mode.adopted:
            notes.append(
                f"{mode.adopted} tensors on the CPU met tensors on the GPU and were taken to be "
                "there too; on a real GPU, move them first"
            )
        if is_compiled(workload.model):
            notes.append(
                "the model is compiled; it was simulated through its eager original, and compiled "
                "kernels usually need less memory"
            )
        trace = recorder.trace(micro_batch, accumulation_steps)
        return Run(
            trace=trace,
            replay=replay(trace, self.allocator()),
            seconds=time.perf_counter() - started,
            loss=session.loss_kind,
            optimizer=type(session.optimizer).__name__,
            notes=tuple(notes),
        )


class _Workspaces:
    """A recorder that adds workspaces: cuBLAS keeps its own, cuDNN gives them back at once."""

    def __init__(self, recorder: StorageRecorder, spec: GpuSpec, device: torch.device):
        self._recorder = recorder
        self._device = device
        self._spec = spec
        self._size_bytes = cublas_workspace_bytes(spec.compute_capability)
        self._threads: set[bool] = set()
        self._in_backward = False

    def begin(self, phase: Phase, window: int = 0, micro_batch: int = 0) -> None:
        self._in_backward = phase == "backward"
        self._recorder.begin(phase, window, micro_batch)

    def tag(self, tensors: Iterable[Any], category: Category) -> None:
        self._recorder.tag(tensors, category)

    def before(self, func: Any, args: Sequence[Any]) -> Callable[[], None] | None:
        if not takes_workspace(func) or not any(map(self._is_ours, args)):
            return None
        if uses_cublas(func) and self._in_backward not in self._threads:
            self._threads.add(self._in_backward)
            self._recorder.hidden(self._size_bytes, "cublas workspace")
        workspaces = convolution_workspaces(func, args, self._spec)
        self._recorder.expect(workspaces, "cudnn workspace")
        copies = [self._recorder.hidden(n, "contiguous") for n in contiguous_copies(func, args)]
        return partial(self._free, copies) if copies else None

    def _is_ours(self, value: Any) -> bool:
        return isinstance(value, FakeTensor) and value.fake_device == self._device

    def _free(self, blocks: list[int]) -> None:
        for block in blocks:
            self._recorder.free(block)


def _shape_notes(unknown: UnknownValues) -> Iterator[str]:
    if unknown.upper_bounds:
        ops = ", ".join(sorted(unknown.upper_bounds))
        yield (
            f"shapes that depend on values ({ops}) took their upper bound: the real run may need "
            "less memory"
        )
    if unknown.shared_out:
        yield (
            "sizes of parts that depend on values (split) were taken to be equal: the real run "
            "may need more memory or less"
        )
    if unknown.followed:
        ops = ", ".join(sorted(unknown.followed))
        yield (
            f"shapes that depend on values ({ops}) followed those of the sample: a run on others "
            "may need more memory"
        )
