"""The same training step on the CPU, with real tensors: what is alive as the backward pass begins.

What is counted shares nothing with the virtual GPU: PyTorch's own kernels run, autograd hands over
what it saves, and a storage is alive as long as PyTorch says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from autobatch.workload.loss import DefaultLoss
from autobatch.workload.optimizers import each_of, made_for, mapped
from autobatch.workload.training_window import Training, run_windows
from autobatch.workload.workload import Workload

_SMALL = 1
"""Numbers in a tensor that optimizers keep on the CPU, such as the count of steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OnCpu:
    """What a forward pass left, at one micro-batch.

    Attributes:
        alive_bytes: storages that the forward pass made and that are alive at its end.
        saved_bytes: those of them that autograd saved for the backward pass, as its hooks show.
        state_bytes: what the optimizer holds after a step; None where none was made.
    """

    micro_batch: int
    alive_bytes: int
    saved_bytes: int
    state_bytes: int | None


class _ForwardEndsError(Exception):
    """The forward pass has been seen, and the rest is not needed."""


class _Storages(TorchDispatchMode):
    """Notes every storage that an op makes, without keeping it."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}
        self._before: set[int] = set()
        self._kept: list[StorageWeakRef] = []

    def known(self, tensors: Iterator[Tensor]) -> None:
        """Leave storages out that were there before."""
        for tensor in tensors:
            ref = StorageWeakRef(tensor.untyped_storage())
            self._kept.append(ref)  # so that its address is not given again
            self._before.add(ref.cdata)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [leaf for leaf in tree_leaves((args, kwargs)) if _has_storage(leaf)]
        before = {leaf.untyped_storage()._cdata for leaf in given}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if _has_storage(leaf) and leaf.untyped_storage()._cdata not in before:
                self._note(leaf)
        return result

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.made and key not in self._before:
            self.made[key] = (StorageWeakRef(storage), storage.nbytes())

    def alive(self) -> dict[int, int]:
        """Return the bytes of what was made and is alive, by storage."""
        return {key: size for key, (ref, size) in self.made.items() if not ref.expired()}


def _has_storage(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.layout is torch.strided and leaf.numel() > 0


class _Watch:
    """The phases of a window, of which the first forward pass is watched."""

    def __init__(self, model: nn.Module, only_forward: bool) -> None:
        self._model = model
        self._only_forward = only_forward
        self._mode: _Storages | None = None
        self._hooks: Any = None
        self._saved: set[int] = set()
        self.alive_bytes = self.saved_bytes = 0

    def begin(self, phase: str, window: int = 0, micro_batch: int = 0) -> None:
        if (window, micro_batch) != (0, 0):
            return
        if phase == "forward" and self._mode is None:
            self._mode = _Storages()
            self._mode.known(iter([*self._model.parameters(), *self._model.buffers()]))
            self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda saved: saved)
            self._hooks.__enter__()
            self._mode.__enter__()
        elif phase == "backward" and self._hooks is not None:
            assert self._mode is not None
            alive = self._mode.alive()
            self.alive_bytes = sum(alive.values())
            self.saved_bytes = sum(alive[key] for key in self._saved & alive.keys())
            self.close()
            if self._only_forward:
                raise _ForwardEndsError

    def ended(self) -> None:
        """Do nothing: one forward pass is all that is watched."""

    def _pack(self, tensor: Tensor) -> Tensor:
        if _has_storage(tensor):
            self._saved.add(tensor.untyped_storage()._cdata)
        return tensor.detach()  # a result that its own node holds would live for ever

    def close(self) -> None:
        """Take the hooks away, if they are there."""
        if self._hooks is not None:
            assert self._mode is not None
            self._mode.__exit__(None, None, None)
            self._hooks.__exit__(None, None, None)
            self._hooks = None


def on_cpu(workload: Workload, micro_batch: int, *, step: bool) -> OnCpu:
    """Run a window of one micro-batch on the CPU, at least its forward pass; the model is trained.

    Args:
        workload: what was planned; its own objects run.
        micro_batch: samples.
        step: whether to go on to the optimizer's step.
    """
    model = workload.model.train()
    given = mapped(lambda one: made_for(one, model), workload.optimizer)
    optimizers = each_of(given)
    watch = _Watch(model, only_forward=not step)
    try:
        run_windows(
            Training(
                workload=replace(workload, autocast=None, evaluate=None),
                model=model,
                optimizers=optimizers,
                given=given,
                loss=workload.loss or DefaultLoss(),
                batch=lambda: workload.batch(micro_batch),
                accumulation_steps=1,
                windows=1,
                phases=watch,
            )
        )
    except _ForwardEndsError:
        pass
    finally:
        watch.close()
    return OnCpu(
        micro_batch=micro_batch,
        alive_bytes=watch.alive_bytes,
        saved_bytes=watch.saved_bytes,
        state_bytes=optimizer_bytes(optimizers, model) if step else None,
    )


def optimizer_bytes(optimizers: Sequence[Any], model: nn.Module) -> int:
    """Return the bytes of the tensors that optimizers reach, parameters and gradients apart."""
    trained = [p for each in optimizers for group in each.param_groups for p in group["params"]]
    others = [*model.parameters(), *model.buffers(), *trained]
    seen = {id(tensor) for tensor in others}
    storages = {key for tensor in others for key, _ in _plain(tensor)}
    storages |= {k for tensor in others if tensor.grad is not None for k, _ in _plain(tensor.grad)}
    found: dict[int, int] = {}
    waiting: list[Any] = [vars(each) for each in optimizers]
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            if value.numel() > _SMALL:
                found.update(_plain(value))
        elif isinstance(value, dict):
            waiting.extend(value.values())
        elif isinstance(value, (list, tuple, set)):
            waiting.extend(value)
        elif hasattr(value, "__dict__") and not (isinstance(value, nn.Module) or callable(value)):
            waiting.append(vars(value))
    return sum(size for key, size in found.items() if key not in storages)


def _plain(tensor: Tensor) -> Iterator[tuple[int, int]]:
    """Yield the storages of a tensor, which a subclass may have several of, and their bytes."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _plain(getattr(tensor, name))
    elif _has_storage(tensor):
        storage = tensor.untyped_storage()
        yield storage._cdata, storage.nbytes()


def storage_bytes(tensors: Any) -> int:
    """Return the bytes of tensors, each storage once."""
    return sum(dict(pair for tensor in tensors for pair in _plain(tensor)).values())
