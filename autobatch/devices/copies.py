"""Copies of the user's objects on a device, made without touching the originals.

Invariant: what was one object is one object among the copies, so that tied parameters stay tied.
No weight is read, moved or materialised, unless the function that makes memory does so.
"""

from __future__ import annotations

import contextlib
import functools
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from autobatch.devices.places import Stage
from autobatch.devices.reach import Walk
from autobatch.errors import WorkloadError
from autobatch.support.randomness import random_state_kept
from autobatch.support.tensor_parts import is_composed, recomposed
from autobatch.support.torch_private import DisableTorchFunction, no_dispatch
from autobatch.support.units import format_bytes
from autobatch.workload.optimizers import each_of, is_optimizer, parameters_of, state_of
from autobatch.workload.wrappers import unwrapped

_WORTH_SAYING_BYTES = 2**20

__all__ = ["Copier", "batch_of", "blank", "flatten_weights_as"]


def blank(original: Tensor, device: torch.device) -> Tensor:
    """Make uninitialised memory of a tensor's layout on a device."""
    return torch.empty_strided(
        original.size(), original.stride(), dtype=original.dtype, device=device
    )


def batch_of(build: Callable[[int], Any], samples: int) -> Any:
    """Return a batch; what the user's function counts, logs or draws meanwhile is as before."""
    copier = Copier(torch.device("cpu"), blank)
    copied = copier.loader(build)
    with copier.stage(), random_state_kept():
        return copied(samples)


def flatten_weights_as(original: nn.Module, copied: nn.Module) -> None:
    """Put the weights of a copy's recurrent layers into one buffer, as those of the original are.

    `Module.to` does so for a layer that it moves to the card. From weights that are scattered,
    cuDNN makes such a buffer in every forward pass, which a training of the original does not have.
    """
    for one, other in zip(original.modules(), copied.modules(), strict=False):
        if isinstance(one, nn.RNNBase) and isinstance(other, nn.RNNBase):
            weights = list(one.parameters(recurse=False))
            storages = {weight.untyped_storage()._cdata for weight in weights}
            if len(storages) == 1 or not any(weight.is_cuda for weight in weights):
                other.flatten_parameters()


class Copier(Walk):
    """Makes deep copies, and remembers the counterpart of every original.

    The counterpart of a parameter or buffer is on the device, and so is that of a tensor that a
    variable of the user's is bound to. That of any other tensor is where the tensor was; one on
    `meta` counts as on the CPU, as the user never said where it would be.

    Attributes:
        optimizers: the copies of optimizers, wherever they were met.
    """

    def __init__(self, device: torch.device, make: Callable[[Tensor, torch.device], Tensor]):
        """Copy to `device`; `make` makes the memory of a tensor there, with its values or not."""
        super().__init__()
        self.optimizers: list[torch.optim.Optimizer] = []
        self._device = device
        self._make = make
        self._moved_modules: set[int] = set()
        self._made: set[int] = set()  # ids of counterparts, which the memo keeps
        self._hooked: list[Tensor] = []

    def any(self, value: Any) -> Any:
        """Copy anything that a step may use; what functions read is staged (see `stage`).

        Raises:
            WorkloadError: it is nested too deeply to be copied.
        """
        try:
            return self.copied(value, is_bound=True)
        except RecursionError as error:
            raise WorkloadError(
                f"{type(value).__name__} is nested too deeply to be copied for the probe: build it "
                "in a function and pass a Workload"
            ) from error

    def close(self) -> None:
        """Let go of all copies, and of gradients that the run left: C++ holds these in cycles."""
        for duplicate in self._memo.values():
            if id(duplicate) in self._made and duplicate.is_leaf:
                duplicate.grad = None
        super().close()

    def loader(self, value: Any) -> Any:
        """Copy what makes batches: its tensors and modules are shared, its counters are not."""
        self._shares_state = True
        try:
            return self.any(value)
        finally:
            self._shares_state = False

    def stage(self) -> Stage:
        """Return the places in which the copies have to be while the user's code runs.

        Hooks of tensors are registered on the counterparts.
        """
        stage = self.walked()
        while self._hooked:
            self._hook(self._hooked.pop())
            stage = self.walked()
        return stage

    def model(self, model: nn.Module) -> nn.Module:
        """Copy a module, its parameters and buffers first, in the order of `Module.to`."""
        inner = unwrapped(model)
        known: nn.Module | None = self._memo.get(id(inner))
        if known is None:
            is_root = id(inner) not in self._moved_modules
            if is_root:
                self._move_state(inner)
            known = self._object(inner, type(inner))
            if is_root:
                _without_compiled_code(known)
                self._followed(known)
        if inner is not model:
            self.remember(model, known)
        return known

    def known(self, module: nn.Module) -> nn.Module:
        """Return the copy of a part of a model that was copied; the part itself where it has none.

        A part that is compiled and its eager original have the same.
        """
        found: nn.Module = self._memo.get(id(unwrapped(module)), module)
        return found

    def _followed(self, duplicate: nn.Module) -> None:
        """Call `.to(device)` where classes of a copy learn from it where they are."""
        if self._device.type == "meta":
            return
        if any(map(_learns_its_device, set(map(type, duplicate.modules())))):
            duplicate.to(self._device)

    def tensor(self, original: Tensor, *, is_bound: bool) -> Tensor:
        """Return a tensor's counterpart, on the device if a name is bound to the tensor itself."""
        if is_bound and original.dim():
            return self.move(original)
        place = original.device
        return self.move(original, torch.device("cpu") if place.type == "meta" else place)

    def optimizer(self, given: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Copy an optimizer to the device, with its parameters and their state.

        Where a parameter's counterpart is sharded, state of the parameter's shape is sharded too.
        State of another shape cannot be: that parameter's state is left out, and the next step
        makes it anew.
        """
        known: torch.optim.Optimizer | None = self._memo.get(id(given))
        if known is not None:
            return known
        for group in given.param_groups:
            for parameter in group["params"]:
                self.move(parameter)
        lost = set()
        for parameter, state in given.state.items():
            for value in state.values() if isinstance(state, dict) else ():
                # step counters stay on the CPU
                if isinstance(value, Tensor) and value.dim() and not self._moved(value, parameter):
                    lost.add(parameter)
        self._move_nested_state(given)
        # `Optimizer.__getstate__` would drop attributes that a subclass adds; `step` is left out
        # because schedulers replace it by a function that holds the original
        attributes = {name: value for name, value in vars(given).items() if name != "step"}
        if lost:
            kept = {key: state for key, state in given.state.items() if key not in lost}
            attributes["state"] = defaultdict(dict, kept)
        duplicate: torch.optim.Optimizer = type(given).__new__(type(given))
        self.remember(given, duplicate)
        vars(duplicate).update({name: self.copied(part) for name, part in attributes.items()})
        if hasattr(vars(given).get("step"), "_wrapped_by_lr_sched"):
            vars(duplicate)["step"] = _seen_by_schedules(duplicate)
        self.optimizers.append(duplicate)
        return duplicate

    def optimizers_of(self, given: Any) -> Any:
        """Copy the optimizer of a workload, or several, whatever their classes; or what makes them.

        Raises:
            WorkloadError: one is nested too deeply to be copied.
        """
        for one in each_of(given):
            if is_optimizer(one) and not isinstance(one, torch.optim.Optimizer):
                for parameter in parameters_of([one]):
                    self.move(parameter)
                self._move_nested_state(one)
        return self.any(given)

    def _move_nested_state(self, given: Any) -> None:
        """Move state that an optimizer has in containers and objects; counters stay on the CPU."""
        for value in state_of(given):
            if value.dim():
                self.move(value)
        shapes = {parameter.shape for parameter in parameters_of([given])}
        for value in state_of(given, attributes=True):
            if value.shape in shapes:
                self.move(value)

    def _moved(self, value: Tensor, parameter: Any) -> bool:
        """Move state that an optimizer keeps for a parameter; return whether that is possible."""
        shard = self._memo.get(id(parameter))
        if shard is None or not hasattr(shard, "placements"):
            self.move(value)
        elif value.shape != shard.shape:
            return False
        elif id(value) not in self._memo:
            self.remember(value, torch.empty_like(shard, dtype=value.dtype, requires_grad=False))
        return True

    @contextlib.contextmanager
    def on_host(self) -> Iterator[None]:
        """Copy to the CPU in the block, and not to the device: what is copied is moved later."""
        device, self._device = self._device, torch.device("cpu")
        try:
            yield
        finally:
            self._device = device

    def changed(self, duplicate: nn.Module, change: Callable[[nn.Module], nn.Module]) -> nn.Module:
        """Apply `change` to a copied module, and return what it returns.

        Parameters and buffers that `change` puts in the place of others become the originals'
        counterparts; those that it flattens into others have none.
        """
        places = [
            (held, name, tensor)
            for module in duplicate.modules()
            for held in (module._parameters, module._buffers)
            for name, tensor in held.items()
        ]
        result = change(duplicate)
        new = {id(old): now[name] for now, name, old in places if now.get(name, old) is not old}
        for key, known in self._memo.items():
            if id(known) in new:
                self._memo[key] = new[id(known)]
        # the ids of those that are replaced will be given to other objects
        self._made = (self._made - new.keys()) | set(map(id, new.values()))
        return result

    def move(self, original: Tensor, device: torch.device | None = None) -> Tensor:
        """Return a tensor's counterpart; one that is made now is on the device, or on another."""
        known: Tensor | None = self._memo.get(id(original))
        if known is None:
            known = self._like(original, device or self._device)
            self.remember(original, known)
            self._made.add(id(known))
            if _hooks_of(original):
                self._hooked.append(original)
        return known

    def is_copy(self, tensor: Tensor) -> bool:
        """Whether a tensor is the counterpart of one of the user's."""
        return id(tensor) in self._made

    def _like(self, original: Tensor, device: torch.device) -> Tensor:
        """Make a tensor of the same layout, kind and attributes on a device."""
        if nn.parameter.is_lazy(original):
            raise WorkloadError(
                "the model has lazy parameters without a shape: call it once on a real batch first"
            )
        if original.layout is not torch.strided:
            data = self._sparse(original)
        elif is_composed(original) and not hasattr(original, "placements"):
            data = recomposed(original, lambda part: self.move(part, device))
        else:
            data = self._make(original, device)
        if isinstance(original, nn.Parameter):
            data = nn.Parameter(data, requires_grad=original.requires_grad)
        elif original.is_leaf and original.requires_grad:
            data.requires_grad_()
        attributes = {k: v for k, v in original.__dict__.items() if not isinstance(v, Tensor)}
        data.__dict__.update({k: v for k, v in attributes.items() if k not in data.__dict__})
        return data

    def _sparse(self, original: Tensor) -> Tensor:
        """Copy a sparse tensor, on the CPU: what uses it on the device says that it is sparse."""
        with no_dispatch():
            copied = original.detach().clone()
            size_bytes = sum(part.nbytes for part in _dense_parts(copied))
        if size_bytes >= _WORTH_SAYING_BYTES:
            self.notes.append(
                f"a sparse tensor of shape {tuple(original.shape)} is not in the account: "
                f"{format_bytes(size_bytes)}"
            )
        return copied

    def _hook(self, original: Tensor) -> None:
        """Register the hooks of a tensor on its counterpart."""
        duplicate = self._memo[id(original)]
        for register, hook in _hooks_of(original):
            copied = self.copied(hook)
            if duplicate.requires_grad:
                getattr(duplicate, register)(copied)

    def _move_state(self, module: nn.Module) -> None:
        self._moved_modules.add(id(module))
        for child in module.children():
            self._move_state(child)
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                self.move(tensor)


def _dense_parts(tensor: Tensor) -> tuple[Tensor, ...]:
    """Return the indices and values of a sparse tensor."""
    if tensor.layout is torch.sparse_coo:
        return tensor._indices(), tensor._values()
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return tensor.crow_indices(), tensor.col_indices(), tensor.values()
    return tensor.ccol_indices(), tensor.row_indices(), tensor.values()


def _without_compiled_code(duplicate: nn.Module) -> None:
    """Let a copy run eagerly: compiled code belongs to the originals."""
    for module in duplicate.modules():
        module._compiled_call_impl = None


@functools.cache
def _learns_its_device(kind: type[nn.Module]) -> bool:
    """Whether a class of modules notices that it is moved, as Lightning's and metrics do."""
    return any(
        {"to", "_apply"} & vars(base).keys()
        for base in kind.__mro__
        if not base.__module__.startswith("torch.")
    )


def _hooks_of(tensor: Tensor) -> list[tuple[str, Any]]:
    """Return the hooks of a tensor, with the method that registers each."""
    with DisableTorchFunction():  # a mode would be asked for each attribute
        at_backward, after = tensor._backward_hooks, tensor._post_accumulate_grad_hooks
    own: list[tuple[str, Any]] = []
    own += [("register_hook", hook) for hook in (at_backward or {}).values()]
    own += [("register_post_accumulate_grad_hook", hook) for hook in (after or {}).values()]
    return own


def _seen_by_schedules(optimizer: torch.optim.Optimizer) -> Callable[..., Any]:
    """Return the optimizer's step as schedules wrap it, to see that it comes before their own."""
    plain = type(optimizer).step

    @functools.wraps(plain)
    def step(*args: Any, **kwargs: Any) -> Any:
        optimizer._opt_called = True  # type: ignore[attr-defined]
        return plain(optimizer, *args, **kwargs)

    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
    return step
