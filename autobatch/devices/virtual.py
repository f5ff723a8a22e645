"""A GPU that is not in the machine: the user's own code on fake tensors, in seconds.

Forward and backward run through PyTorch's real autograd engine and optimizers; only kernels and
memory are missing. Invariant: the user's model, optimizer and random states are as before.
"""

from __future__ import annotations

import contextlib
import gc
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from autobatch.devices import norms, rnn
from autobatch.devices.backend import pretend, virtual_device
from autobatch.devices.base import Run
from autobatch.devices.calls import CudaCalls
from autobatch.devices.copies import Copier, eager
from autobatch.devices.fake import VirtualMode
from autobatch.devices.guard import lost_error
from autobatch.devices.kernels import USES_CUBLAS, cublas_workspace_bytes
from autobatch.devices.recorder import StorageRecorder
from autobatch.devices.standins import StandIns
from autobatch.devices.substitutes import cuda_kernels
from autobatch.errors import AutobatchError, WorkloadError
from autobatch.footprint import Evidence
from autobatch.gpus import GpuSpec
from autobatch.trace import Phase
from autobatch.workload import DefaultLoss, Loss, Workload, run_windows

__all__ = ["WINDOWS", "VirtualGpu"]

WINDOWS = 2
"""Traced windows: optimizer state appears in the first, the steady peak in the second."""

_KERNELS: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.native_batch_norm.default: norms.batch_norm,
    torch.ops.aten.native_batch_norm_backward.default: norms.batch_norm_backward,
    torch.ops.aten._cudnn_rnn.default: rnn.forward_outputs,
    torch.ops.aten._cudnn_rnn_backward.default: rnn.backward_outputs,
}

_CUDNN_FLAGS = ("enabled", "benchmark", "deterministic", "allow_tf32")


class VirtualGpu:
    """Runs workloads on a simulated GPU."""

    evidence: Evidence = "simulated"

    def __init__(self, spec: GpuSpec):
        """Simulate the card that `spec` describes."""
        self.spec = spec
        self._recipes: dict[Any, Any] = {}

    def run(self, workload: Workload, *, micro_batch: int, accumulation_steps: int) -> Run:
        """Run two training windows of `accumulation_steps` micro-batches without a GPU.

        Raises:
            WorkloadError: the user's model, loss or optimizer failed; the cause is chained.
        """
        started = time.perf_counter()
        device = virtual_device()
        recorder = StorageRecorder()
        standins = StandIns(_KERNELS)
        workspaces = _Workspaces(recorder, self.spec)
        copier = Copier(device)
        mode = VirtualMode(
            device, recorder, standins, workspaces.before, copier.move, self._recipes
        )
        calls = CudaCalls(device)
        original, compiled = eager(workload.model)
        with (
            _undisturbed(),
            pretend(self.spec, device),
            torch.compiler.set_stance("force_eager"),
            cuda_kernels(device, self.spec.compute_capability),
            mode,
            calls,
            calls.in_backward(),
            _user_errors(workload, micro_batch),
        ):
            session = _Session(workload, original, device, copier, recorder, workspaces)
            session.train(micro_batch, accumulation_steps)
        warnings = list(_upper_bound_warnings(standins))
        if mode.adopted:
            warnings.append(
                f"{mode.adopted} tensors on the CPU met tensors on the GPU and were taken to be "
                "there too; on a real GPU, move them first"
            )
        if compiled:
            warnings.append(
                "the model is compiled; it was simulated through its eager original, and compiled "
                "kernels usually need less memory"
            )
        return Run(
            trace=recorder.trace(micro_batch, accumulation_steps),
            seconds=time.perf_counter() - started,
            loss=session.loss_kind,
            optimizer=type(session.optimizer).__name__,
            warnings=tuple(warnings),
        )


class _Workspaces:
    """cuBLAS workspaces: taken at the first product of each thread, kept for good."""

    def __init__(self, recorder: StorageRecorder, spec: GpuSpec):
        self._recorder = recorder
        self._size_bytes = cublas_workspace_bytes(spec.compute_capability)
        self._threads: set[bool] = set()
        self.in_backward = False

    def before(self, func: Any, args: Sequence[Any]) -> None:
        if func._schema.name in USES_CUBLAS and self.in_backward not in self._threads:
            self._threads.add(self.in_backward)
            self._recorder.hidden(self._size_bytes, "cublas workspace")


class _Session:
    """One simulated process: copies on the device, windows run over them, memory categorised."""

    def __init__(
        self,
        workload: Workload,
        model: nn.Module,
        device: torch.device,
        copier: Copier,
        recorder: StorageRecorder,
        workspaces: _Workspaces,
    ):
        self._device = device
        self._recorder = recorder
        self._workspaces = workspaces
        self._copier = copier
        recorder.begin("setup")
        self._model = self._copier.model(model).train()
        self._workload = replace(workload, evaluate=self._copier.any(workload.evaluate))
        recorder.tag(self._model.parameters(), "parameters")
        recorder.tag(self._model.buffers(), "buffers")
        self._default_loss = DefaultLoss()
        self._loss = self._copied_loss()
        self.optimizer = self._make_optimizer()
        trained = (p for group in self.optimizer.param_groups for p in group["params"])
        recorder.tag(trained, "parameters")  # a loss may have some of its own
        self._tag_optimizer_state()

    @property
    def loss_kind(self) -> str:
        if self._workload.loss is not None:
            return self._workload.loss_name
        return self._default_loss.kind or "user"

    def train(self, micro_batch: int, accumulation_steps: int) -> None:
        run_windows(
            self._workload,
            model=self._model,
            optimizer=self.optimizer,
            loss=self._loss,
            batch=lambda: self._batch(micro_batch),
            accumulation_steps=accumulation_steps,
            windows=WINDOWS,
            phases=self,
        )
        self._tag()

    def begin(self, phase: Phase, window: int = 0, micro_batch: int = 0) -> None:
        """Note a phase, and whose the storages of the last one were."""
        if phase in ("inputs", "step"):
            gc.collect(1)  # cyclic garbage would otherwise go at some random moment
            self._tag()
        self._workspaces.in_backward = phase == "backward"
        self._recorder.begin(phase, window, micro_batch)

    def _tag(self) -> None:
        gradients = (p.grad for p in self._model.parameters() if p.grad is not None)
        self._recorder.tag(gradients, "gradients")
        self._tag_optimizer_state()

    def _tag_optimizer_state(self) -> None:
        tensors = (
            value
            for state in self.optimizer.state.values()
            if isinstance(state, dict)
            for value in state.values()
            if isinstance(value, Tensor)
        )
        self._recorder.tag(tensors, "optimizer_state")

    def _copied_loss(self) -> Loss:
        loss = self._workload.loss
        if loss is None:
            return self._default_loss
        if isinstance(loss, nn.Module):
            return self._copier.model(loss)
        return self._copier.any(loss)  # type: ignore[no-any-return]

    def _make_optimizer(self) -> torch.optim.Optimizer:
        given = self._workload.optimizer
        if isinstance(given, torch.optim.Optimizer):
            optimizer = self._copier.optimizer(given)
            held = [p for group in optimizer.param_groups for p in group["params"]]
            if not set(map(id, held)) & set(map(id, self._model.parameters())):
                raise WorkloadError(
                    f"the {type(given).__name__} holds none of the model's parameters: make it "
                    "from the parameters of the model that is tuned"
                )
            return optimizer
        trainable = [p for p in self._model.parameters() if p.requires_grad]
        if not trainable:
            raise WorkloadError("no parameter requires a gradient: there is nothing to train")
        make = self._copier.any(given) if not isinstance(given, type) else given
        return make(trainable)  # type: ignore[no-any-return]

    def _batch(self, micro_batch: int) -> Any:
        return tree_map(self._to_device, self._workload.batch(micro_batch))

    def _to_device(self, leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf if leaf.device == self._device else leaf.to(self._device)
        return leaf


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Put back random states, torch's switches and the collector's; collect where we say."""
    states = torch.get_rng_state(), random.getstate()
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    gradients, dtype = torch.is_grad_enabled(), torch.get_default_dtype()
    flags = {name: getattr(torch.backends.cudnn, name) for name in _CUDNN_FLAGS}
    deterministic = torch.are_deterministic_algorithms_enabled()
    numpy = _numpy_random()
    numpy_state = numpy.get_state() if numpy else None
    collecting = gc.isenabled()
    frozen_by_user = gc.get_freeze_count()
    gc.disable()
    gc.freeze()  # what is alive now is no garbage of ours; leaving it out makes collecting fast
    try:
        yield
    finally:
        if not frozen_by_user:
            gc.unfreeze()
        if collecting:
            gc.enable()
        torch.set_grad_enabled(gradients)
        torch.set_default_dtype(dtype)
        for name, flag in flags.items():
            setattr(torch.backends.cudnn, name, flag)
        torch.use_deterministic_algorithms(deterministic)
        torch.set_rng_state(states[0])
        if cuda_states:
            torch.cuda.set_rng_state_all(cuda_states)
        random.setstate(states[1])
        if numpy:
            numpy.set_state(numpy_state)


def _numpy_random() -> Any:
    try:
        import numpy
    except ImportError:
        return None
    return numpy.random


@contextlib.contextmanager
def _user_errors(workload: Workload, micro_batch: int) -> Iterator[None]:
    """Turn whatever the user's code raises into one clear line, with its traceback chained."""
    try:
        yield
    except AutobatchError:
        raise
    except Exception as caught:
        error = lost_error(caught)
        if isinstance(error, AutobatchError):
            raise error from error.__cause__
        summary = str(error).strip().splitlines()
        raise WorkloadError(
            f"{type(workload.model).__name__} failed at micro-batch {micro_batch}: "
            f"{type(error).__name__}: {summary[0] if summary else ''}"
        ) from error


def _upper_bound_warnings(standins: StandIns) -> Iterator[str]:
    if standins.upper_bounds:
        ops = ", ".join(sorted(standins.upper_bounds))
        yield (
            f"shapes that depend on values ({ops}) took their upper bound: the real run may need "
            "less memory"
        )
