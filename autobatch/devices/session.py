"""One training process on a device: copies of the user's objects, windows run over them.

Invariant: the user's own model, loss and optimizer are read, never run.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from autobatch.devices.copies import Copier
from autobatch.errors import AutobatchError, WorkloadError
from autobatch.memory.trace import Category, Phase
from autobatch.workload.loss import DefaultLoss
from autobatch.workload.training_window import Training, run_windows
from autobatch.workload.tree import map_tensors
from autobatch.workload.workload import Loss, Workload
from autobatch.workload.wrappers import is_data_parallel

__all__ = ["CopiedObjects", "Recorder", "Session", "user_errors"]

_BUCKET_BYTES = 25 * 2**20
"""Default `bucket_cap_mb` of DistributedDataParallel."""


class Recorder(Protocol):
    """Told where a run is and whose the memory is."""

    def begin(self, phase: Phase, window: int = 0, micro_batch: int = 0) -> None:
        """A phase begins."""

    def tag(self, tensors: Iterable[Any], category: Category) -> None:
        """The storages of these tensors belong to a category for their whole life."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CopiedObjects:
    """What runs in place of the user's objects."""

    model: nn.Module
    loss: Loss
    workload: Workload
    optimizer: torch.optim.Optimizer

    @classmethod
    def make(
        cls,
        workload: Workload,
        model: nn.Module,
        copier: Copier,
        before_optimizer: Callable[[nn.Module], nn.Module],
    ) -> CopiedObjects:
        """Copy a workload's objects, of which `model` is the module to train.

        Args:
            workload: what the user wants to run.
            model: its module, without wrappers of compilers and data parallelism.
            copier: makes the copies.
            before_optimizer: given the copied module, returns what will run in its place.

        Raises:
            WorkloadError: something cannot be copied, or there is nothing to train.
        """
        copied = copier.changed(copier.model(model).train(), before_optimizer)
        run = replace(
            workload,
            evaluate=copier.any(workload.evaluate),
            window=copier.any(workload.window),
        )
        return cls(
            model=copied,
            workload=run,
            loss=_copied_loss(workload.loss, copier),
            optimizer=_copied_optimizer(workload.optimizer, copied, copier),
        )


def _copied_loss(loss: Loss | None, copier: Copier) -> Loss:
    if loss is None:
        return DefaultLoss()
    if isinstance(loss, nn.Module):
        return copier.model(loss)
    return copier.any(loss)  # type: ignore[no-any-return]


def _copied_optimizer(given: Any, model: nn.Module, copier: Copier) -> torch.optim.Optimizer:
    if isinstance(given, torch.optim.Optimizer):
        optimizer = copier.optimizer(given)
        held = [p for group in optimizer.param_groups for p in group["params"]]
        if not set(map(id, held)) & set(map(id, model.parameters())):
            raise WorkloadError(
                f"the {type(given).__name__} holds none of the model's parameters: make it "
                "from the parameters of the model that is tuned"
            )
        return optimizer
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise WorkloadError("no parameter requires a gradient: there is nothing to train")
    make = copier.any(given) if not isinstance(given, type) else given
    return make(trainable)  # type: ignore[no-any-return]


class Session:
    """Runs windows and tells a recorder whose memory is whose."""

    def __init__(
        self,
        workload: Workload,
        model: nn.Module,
        device: torch.device,
        copier: Copier,
        recorder: Recorder,
        wrap: Callable[[nn.Module], nn.Module] = lambda model: model,
    ):
        """Set up on `device`; `wrap` makes what will run from the copied module."""
        self._device = device
        self._recorder = recorder
        recorder.begin("setup")

        def tagged(copied: nn.Module) -> nn.Module:
            wrapped = wrap(copied)
            recorder.tag(map(_local, copied.parameters()), "parameters")
            recorder.tag(copied.buffers(), "buffers")
            return wrapped

        self._copies = CopiedObjects.make(workload, model, copier, tagged)
        self._buckets = _gradient_buckets(workload, self._copies.model)
        recorder.tag(self._buckets, "gradients")
        self._steps = 0
        self.optimizer.register_step_post_hook(self._count_step)
        # a loss may have some of its own
        recorder.tag(map(_local, self._trained()), "parameters")
        self._tag_optimizer_state()

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer that runs."""
        return self._copies.optimizer

    @property
    def loss_kind(self) -> str:
        """How the loss is obtained, as a plan names it."""
        workload, loss = self._copies.workload, self._copies.loss
        if workload.window is not None:
            return "window function"
        if workload.loss is not None:
            return workload.loss_name
        return (loss.kind if isinstance(loss, DefaultLoss) else None) or "user"

    @property
    def notes(self) -> list[str]:
        """What windows that ran through leave to say."""
        if self._steps:
            return []
        return [
            f"{type(self.optimizer).__name__} never made a step (in fp16, gradients that are not "
            "finite skip it): its state may be missing from the account"
        ]

    def _count_step(self, *_: Any) -> None:
        self._steps += 1

    def train(
        self, micro_batch: int, accumulation_steps: int, *, windows: int, evaluate: bool = True
    ) -> None:
        """Run windows of `accumulation_steps` micro-batches, then the evaluation if asked to."""
        workload = self._copies.workload
        run_windows(
            Training(
                workload=workload if evaluate else replace(workload, evaluate=None),
                model=self._copies.model,
                optimizer=self.optimizer,
                loss=self._copies.loss,
                batch=lambda: self._batch(micro_batch),
                accumulation_steps=accumulation_steps,
                windows=windows,
                phases=self,
            )
        )
        if isinstance(self._copies.loss, DefaultLoss):
            self._copies.loss.forget()
        self._tag()

    def begin(self, phase: Phase, window: int = 0, micro_batch: int = 0) -> None:
        """Note a phase, and whose the storages of the last one were."""
        if phase in ("inputs", "step"):
            gc.collect(1)  # cyclic garbage would otherwise go at some random moment
            self._tag()
        self._recorder.begin(phase, window, micro_batch)

    def _tag(self) -> None:
        # a sharded parameter is in the optimizer also while the model has the whole one
        parameters = itertools.chain(self._copies.model.parameters(), self._trained())
        gradients = (_local(p.grad) for p in parameters if p.grad is not None)
        self._recorder.tag(gradients, "gradients")
        self._tag_optimizer_state()

    def _trained(self) -> Iterator[Tensor]:
        return (p for group in self.optimizer.param_groups for p in group["params"])

    def _tag_optimizer_state(self) -> None:
        tensors = (
            _local(value)
            for state in self.optimizer.state.values()
            if isinstance(state, dict)
            for value in state.values()
            if isinstance(value, Tensor)
        )
        self._recorder.tag(tensors, "optimizer_state")

    def _batch(self, micro_batch: int) -> Any:
        return map_tensors(self._to_device, self._copies.workload.batch(micro_batch))

    def _to_device(self, tensor: Tensor) -> Tensor:
        return tensor if tensor.device == self._device else tensor.to(self._device)


def _local(tensor: Tensor) -> Tensor:
    """Return the memory on this rank of a tensor that is sharded over several (a DTensor)."""
    return getattr(tensor, "_local_tensor", tensor)


def _gradient_buckets(workload: Workload, model: nn.Module) -> list[Tensor]:
    """Return the buffers in which DistributedDataParallel averages gradients, where it does.

    A wrapper around the user's model says how large they are. With `gradient_as_bucket_view` the
    gradients live in the buckets, and nothing comes on top. After its first window DDP makes the
    buckets anew, in the order in which gradients came, about that of the parameters reversed.
    """
    wrapper: Any = workload.model if is_data_parallel(workload.model) else None
    shares = workload.shares or ("ddp" if wrapper is not None else None)
    if shares != "ddp" or (wrapper is not None and wrapper.gradient_as_bucket_view):
        return []
    limit = getattr(wrapper, "bucket_bytes_cap", _BUCKET_BYTES)
    buckets: list[Tensor] = []
    waiting: dict[torch.dtype, list[nn.Parameter]] = {}

    def fill(parameters: list[nn.Parameter]) -> None:
        first = parameters[0]
        elements = sum(p.numel() for p in parameters)
        buckets.append(torch.zeros(elements, dtype=first.dtype, device=first.device))

    for parameter in reversed([p for p in model.parameters() if p.requires_grad]):
        group = waiting.setdefault(parameter.dtype, [])
        group.append(parameter)
        if sum(p.nbytes for p in group) >= limit:
            fill(waiting.pop(parameter.dtype))
    for group in waiting.values():
        fill(group)
    return buckets


@contextlib.contextmanager
def user_errors(workload: Workload, micro_batch: int) -> Iterator[None]:
    """Turn whatever the user's code raises into one clear line, with its traceback chained."""
    try:
        yield
    except AutobatchError:
        raise
    except Exception as error:
        summary = str(error).strip().splitlines()
        raise WorkloadError(
            f"{type(workload.model).__name__} failed at micro-batch {micro_batch}: "
            f"{type(error).__name__}: {summary[0] if summary else ''}"
        ) from error
