"""The model and loss under test, as fresh replicas on the CPU, and one batch that can be cut.

Invariant: the user's objects are only read; every replica starts in the same state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from autobatch.devices.copies import Copier, batch_of
from autobatch.devices.places import Stage
from autobatch.errors import SampleError
from autobatch.support.randomness import random_state_kept
from autobatch.workload.dataset import dataset_length
from autobatch.workload.layout import Layout, compared
from autobatch.workload.loss import DefaultLoss, checked_loss
from autobatch.workload.sample import Rows, rows_of
from autobatch.workload.tree import map_tensors
from autobatch.workload.workload import Loss, Workload
from autobatch.workload.wrappers import unwrapped

__all__ = ["Replica", "Subject", "one_batch"]


class _MeanOfOutputs(DefaultLoss):
    """Stands in for an unknown loss: a mean over samples, of a curved function of the outputs.

    The sum of the outputs of a normalisation layer is constant, so that a plain mean would leave
    the layers before it without a gradient.
    """

    def stand_in(self, outputs: Sequence[Tensor]) -> Tensor:
        return torch.stack([F.softplus(output).mean() for output in outputs]).sum()


@dataclass(frozen=True, slots=True)
class Replica:
    """A copy of the model and of the loss, to run once or a few times."""

    model: nn.Module
    own_loss: Loss
    stage: Stage

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
    """A workload in one floating-point type, of which replicas are made on the CPU."""

    workload: Workload
    dtype: torch.dtype
    _made: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False)

    def replica(self) -> Replica:
        """Return a new replica in training mode; frozen parameters stay frozen.

        Raises:
            WorkloadError: something cannot be copied.
        """
        copier = Copier(torch.device("cpu"), self._with_values)
        model = copier.model(unwrapped(self.workload.model))
        if not model.training:
            model.train()
        loss = self.workload.loss
        copied = _MeanOfOutputs() if loss is None else copier.any(loss)
        return Replica(model, copied, copier.stage())

    def batch(self, samples: int) -> Rows:
        """Build a batch in the subject's dtype that can be cut where two sizes of it differ.

        Raises:
            SampleError: no dimension of its tensors grows with the samples.
        """
        build = self.workload.batch
        batch = map_tensors(self._cast, batch_of(build, samples))
        layout = compared(batch, samples, batch_of(build, samples + 1), samples + 1)
        rows = rows_of(batch) if layout is None else Rows(batch, _needed(layout))
        if rows.size != samples:
            raise SampleError(
                f"a batch of {samples} samples has {rows.size} rows: pass a sample whose tensors "
                "all have one row for each of its samples"
            )
        return rows

    def _cast(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    def _with_values(self, tensor: Tensor, _: torch.device) -> Tensor:
        """Copy a tensor to the CPU; has the signature of `Copier`'s `make`.

        A parameter that is all zero, such as the last gain of a residual branch, would hide all
        layers before it from the experiments, though only until the first update. It gets small
        values instead.
        """
        with torch.no_grad():
            is_weight = isinstance(tensor, nn.Parameter) and tensor.is_floating_point()
            hides = is_weight and not tensor.is_meta and not tensor.any()
            if tensor.is_meta or hides:
                if id(tensor) not in self._made:
                    made = _invented(tensor, seed=len(self._made)) * (0.1 if hides else 1.0)
                    self._made[id(tensor)] = self._cast(made)
                return self._made[id(tensor)].clone()
            return self._cast(tensor.detach().to("cpu", copy=True))


def one_batch(sample: Any, samples: int) -> Any:
    """Return a batch of items from all over a data set or a loader's; any other sample as it is.

    `tune` repeats the largest item because it measures memory; gradients need different items.
    """
    is_loader = isinstance(sample, DataLoader)
    dataset = sample.dataset if is_loader else sample
    length = dataset_length(sample)
    if length is None or isinstance(dataset, IterableDataset) or not isinstance(dataset, Dataset):
        return sample
    number = min(samples, length)
    collate = sample.collate_fn if is_loader else default_collate
    with random_state_kept():
        return collate([dataset[index * length // number] for index in range(number)])


def _needed(layout: Layout) -> Layout:
    """Give every part of a batch all of the tensors that do not grow with the samples."""
    return replace(layout, whole=layout.whole | layout.rest, rest=frozenset())


def _invented(tensor: Tensor, seed: int) -> Tensor:
    """Return random values in a tensor's shape, at the scale of common initialisations."""
    made = torch.zeros(tensor.shape, dtype=tensor.dtype, device="cpu")
    if not made.is_floating_point():
        return made
    generator = torch.Generator().manual_seed(seed)
    if made.dim() < 2:  # values near one do for gains, biases and variances
        return made.uniform_(0.5, 1.5, generator=generator)
    return made.normal_(0.0, made[0].numel() ** -0.5, generator=generator)
