"""The model and loss under test, as fresh replicas on the CPU, and one batch that can be cut.

Invariant: the user's objects are only read; every replica starts in the same state.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from autobatch.devices.copies import Copier, batch_of
from autobatch.devices.places import Stage
from autobatch.equivalence.gradients import is_continuous
from autobatch.errors import SampleError
from autobatch.support.randomness import random_state_kept
from autobatch.support.torch_private import BatchNorm
from autobatch.workload.dataset import dataset_length
from autobatch.workload.kept import attributes_kept
from autobatch.workload.layout import Layout
from autobatch.workload.layout_reading import compared
from autobatch.workload.loss import DefaultLoss, checked_loss
from autobatch.workload.sample import Rows, rows_of
from autobatch.workload.tree import map_tensors
from autobatch.workload.workload import Loss, Workload
from autobatch.workload.wrappers import unwrapped

__all__ = ["Replica", "Subject", "has_batch_norm", "one_batch"]


class _MeanOfOutputs(DefaultLoss):
    """Stands in for an unknown loss: a mean over samples, of a curved function of the outputs.

    The sum of the outputs of a normalisation layer is constant, so that a plain mean would leave
    the layers before it without a gradient.
    """

    def stand_in(self, outputs: Sequence[Tensor]) -> Tensor:
        return torch.stack([F.softplus(output).mean() for output in outputs]).sum()


@dataclass(frozen=True, slots=True)
class Replica:
    """A copy of the model and of the loss, to run once or a few times.

    Attributes:
        trained: the tensors that a backward pass may reach, by name: parameters of the model, and
            those that the loss owns.
    """

    model: nn.Module
    own_loss: Loss
    stage: Stage
    trained: Mapping[str, Tensor]

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Return what the loss gives, with copies in place of all that the user's code reaches."""
        with self.stage:
            return self.own_loss(model, batch)

    def value(self, batch: Any) -> Tensor:
        """Return the loss of a batch.

        Raises:
            WorkloadError: the loss is not a scalar with a gradient.
        """
        return checked_loss(self.loss(self.model, batch))

    @property
    def loss_kind(self) -> str:
        """How the loss was obtained, in the words of a plan."""
        kind = self.own_loss.kind if isinstance(self.own_loss, DefaultLoss) else "user"
        return "mean of the outputs" if kind == "surrogate sum" else kind or "user"


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A workload in one floating-point type, of which replicas are made on the CPU.

    Replicas share the values of parameters, because a pass changes buffers and seldom parameters.
    `refresh` restores those that a run did change.
    """

    workload: Workload
    dtype: torch.dtype
    autocast: str | None = None
    _made: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False)
    _shared: dict[int, _Shared] = field(default_factory=dict, init=False, repr=False)

    def replica(self, *, hooks: bool = True, noise: float = 0.0) -> Replica:
        """Return a new replica in training mode; frozen parameters stay frozen.

        Args:
            hooks: whether the hooks of gradients run, as in training.
            noise: the share of its value by which each trained entry is changed at random.

        Raises:
            WorkloadError: something cannot be copied.
        """
        met: list[Tensor] = []

        def make(original: Tensor, _: torch.device) -> Tensor:
            if original.requires_grad and original.is_leaf:
                met.append(original)
            return self._with_values(original)

        copier = Copier(torch.device("cpu"), make)
        original = unwrapped(self.workload.model)
        model = copier.model(original)
        if not model.training:
            model.train()
        loss = self.workload.loss
        copied = _MeanOfOutputs() if loss is None else copier.any(loss)
        stage = copier.stage()
        names = _names(original, loss)
        trained = {
            names.get(id(one), f"tensor {i} of the loss, {tuple(one.shape)}"): copier.move(one)
            for i, one in enumerate(met)
        }
        if not hooks:
            _without_hooks(model, trained.values())
        if noise:
            generator = torch.Generator().manual_seed(0)
            with torch.no_grad():
                for one in trained.values():
                    shares = torch.randn(one.shape, generator=generator, dtype=one.dtype)
                    one.data = one * (1 + noise * shares)
        return Replica(model, copied, stage, trained)

    def refresh(self) -> None:
        """Restore the parameters that a run has changed in place."""
        for key in [key for key, shared in self._shared.items() if shared.is_changed]:
            del self._shared[key]

    def original(self, trained: Tensor) -> Tensor:
        """Return the value that a replica's trained tensor had before a run changed it."""
        pointer = trained.data_ptr()
        for shared in self._shared.values():
            if shared.value.data_ptr() == pointer:
                return self.copied(shared.of)
        return trained.detach()

    def batch(self, samples: int) -> Rows:
        """Build a batch in the subject's dtype that can be cut where two sizes of it differ.

        Raises:
            SampleError: no dimension of its tensors grows with the samples.
        """
        build = self.workload.batch
        # One tensor may be ids and labels: what is changed or read has to be one of them.
        batch = map_tensors(lambda t: self.cast(t).clone(), batch_of(build, samples))
        layout = compared(batch, samples, batch_of(build, samples + 1), samples + 1)
        rows = rows_of(batch) if layout is None else Rows(batch, _needed(layout))
        if rows.size != samples:
            raise SampleError(
                f"a batch of {samples} samples has {rows.size} rows: pass a sample whose tensors "
                "all have one row for each of its samples"
            )
        return rows

    def cast(self, tensor: Tensor) -> Tensor:
        """Return a floating-point or complex tensor in the subject's type, any other as it is."""
        if tensor.is_complex():
            return tensor.to(self.dtype.to_complex())
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    def _with_values(self, tensor: Tensor) -> Tensor:
        """Return a copy of a tensor on the CPU; that of a parameter is shared."""
        if not isinstance(tensor, nn.Parameter):
            return self.copied(tensor)
        shared = self._shared.get(id(tensor))
        if shared is None:
            shared = self._shared[id(tensor)] = _Shared.of_copy(tensor, self.copied(tensor))
        return shared.value.detach()

    def copied(self, tensor: Tensor) -> Tensor:
        """Copy a tensor to the CPU.

        A parameter that is all zero, such as the last gain of a residual branch, would hide all
        layers before it from the experiments, though only until the first update. It gets small
        values instead.
        """
        with torch.no_grad():
            is_weight = isinstance(tensor, nn.Parameter) and is_continuous(tensor)
            hides = is_weight and not tensor.is_meta and not tensor.any()
            if tensor.is_meta or hides:
                if id(tensor) not in self._made:
                    made = _invented(tensor, seed=len(self._made)) * (0.1 if hides else 1.0)
                    self._made[id(tensor)] = self.cast(made)
                return self._made[id(tensor)].clone()
            return self.cast(tensor.detach().to("cpu", copy=True))


def _names(model: nn.Module, loss: Any) -> dict[int, str]:
    """Return names of parameters, of the model and of modules that the loss is or has, by id."""
    parts = {"": loss, **getattr(loss, "__dict__", {})}
    owned = {name: part for name, part in parts.items() if isinstance(part, nn.Module)}
    names = {
        id(p): f"loss.{name}"
        for prefix, part in owned.items()
        for name, p in part.named_parameters(prefix=prefix)
    }
    return names | {id(p): name for name, p in model.named_parameters()}


@dataclass(frozen=True, slots=True)
class _Shared:
    """The values of a parameter that replicas share, and what shows that a run changed them.

    Writes through `.data` leave the version as it was, so a sum is compared as well.
    """

    of: Tensor
    value: Tensor
    version: int
    total: float

    @classmethod
    def of_copy(cls, original: Tensor, value: Tensor) -> _Shared:
        return cls(original, value, value._version, _total(value))

    @property
    def is_changed(self) -> bool:
        return self.value._version != self.version or _total(self.value) != self.total


def _total(value: Tensor) -> float:
    if value.is_complex():
        value = torch.view_as_real(value.resolve_conj())
    total = float(value.sum()) if value.is_floating_point() else 0.0
    return total if math.isfinite(total) else 0.0


def _without_hooks(model: nn.Module, trained: Iterable[Tensor]) -> None:
    """Take away what changes gradients in the backward pass of a replica."""
    for tensor in trained:
        tensor._backward_hooks = None
        if tensor._post_accumulate_grad_hooks:
            tensor._post_accumulate_grad_hooks.clear()
    for module in model.modules():
        module._backward_hooks.clear()
        module._backward_pre_hooks.clear()


def has_batch_norm(model: nn.Module) -> bool:
    """Whether a layer of the model trains on the statistics of its batch, as far as its class says.

    Only an order of work may depend on this: a verdict does not.
    """
    return any(isinstance(module, BatchNorm) and module.training for module in model.modules())


def one_batch(sample: Any, samples: int) -> tuple[Any, list[str]]:
    """Return a batch of items from all over a data set or a loader's; any other sample as it is.

    `tune` repeats the largest item because it measures memory; gradients need different items.
    What reading them changes in the data set or the collate function is put back, and what cannot
    be is returned in one sentence each.
    """
    is_loader = isinstance(sample, DataLoader)
    dataset = sample.dataset if is_loader else sample
    length = dataset_length(sample)
    if length is None or isinstance(dataset, IterableDataset) or not isinstance(dataset, Dataset):
        return sample, []
    number = min(samples, length)
    collate = sample.collate_fn if is_loader else default_collate
    with random_state_kept(), attributes_kept(dataset, collate) as kept:
        kept.items = number
        batch = collate([dataset[index * length // number] for index in range(number)])
    return batch, kept.lost


def _needed(layout: Layout) -> Layout:
    """Give every part of a batch all of the tensors that do not grow with the samples."""
    return replace(layout, whole=layout.whole | layout.rest, rest=frozenset())


def _invented(tensor: Tensor, seed: int) -> Tensor:
    """Return random values in a tensor's shape, at the scale of common initialisations."""
    made = torch.zeros(tensor.shape, dtype=tensor.dtype, device="cpu")
    if not is_continuous(made):
        return made
    generator = torch.Generator().manual_seed(seed)
    # Values near one do for gains, biases and variances.
    if made.dim() < 2 and not made.is_complex():
        return made.uniform_(0.5, 1.5, generator=generator)
    entries = made[0].numel() if made.dim() > 1 else 1
    return made.normal_(0.0, entries**-0.5, generator=generator)
