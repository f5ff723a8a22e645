"""What is checked: fresh copies of a user's model and loss, and one batch that can be cut.

Invariant: the user's objects are read only; every copy begins in the same state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, default_collate

from autobatch.devices.copies import Copier
from autobatch.errors import SampleError
from autobatch.support.randomness import random_state_kept
from autobatch.workload.dataset import dataset_length
from autobatch.workload.loss import DefaultLoss, checked_loss
from autobatch.workload.sample import Rows, named_tensors, rows_of
from autobatch.workload.tree import map_tensors
from autobatch.workload.workload import Loss, Workload
from autobatch.workload.wrappers import unwrapped

__all__ = ["Copy", "Subject", "cut_batch", "one_batch"]


class _MeanOfOutputs(DefaultLoss):
    """Where no loss is known: a mean over the outputs, curved so that no layer's sums cancel."""

    def stand_in(self, outputs: Sequence[Tensor]) -> Tensor:
        return torch.stack([F.softplus(output).mean() for output in outputs]).sum()


@dataclass(frozen=True, slots=True)
class Copy:
    """A model and a loss to run."""

    model: nn.Module
    loss: Loss

    def value(self, batch: Any) -> Tensor:
        """Return the loss of a batch.

        Raises:
            WorkloadError: the loss is no scalar with a gradient.
        """
        return checked_loss(self.loss(self.model, batch))

    @property
    def loss_kind(self) -> str:
        """How the loss was obtained, as a plan names it."""
        kind = self.loss.kind if isinstance(self.loss, DefaultLoss) else "user"
        return "mean of the outputs" if kind == "surrogate sum" else kind or "user"


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A workload in one floating-point type on the CPU."""

    workload: Workload
    dtype: torch.dtype
    _made: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False)

    def copy(self) -> Copy:
        """Return a copy in training mode, as fresh as the user's own; frozen parts stay frozen.

        Raises:
            WorkloadError: something cannot be copied.
        """
        copier = Copier(torch.device("cpu"), self._with_values)
        model = copier.model(unwrapped(self.workload.model))
        if not model.training:
            model.train()
        loss = self.workload.loss
        if loss is None:
            return Copy(model, _MeanOfOutputs())
        return Copy(model, copier.model(loss) if isinstance(loss, nn.Module) else copier.any(loss))

    def batch(self, samples: int) -> Rows:
        """Build a batch of so many samples, in the floating-point type, that can be cut.

        Raises:
            SampleError: its batch dimension is unknown.
        """
        return cut_batch(self.workload.batch, samples, self._cast)

    def _cast(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    def _with_values(self, tensor: Tensor, _: torch.device) -> Tensor:
        """Copy a tensor to the CPU; has the form of `Copier`'s `make`.

        A parameter of zeros, such as the last gain of a residual branch, would hide all that comes
        before it from the experiments, and not for longer than the first update: small numbers
        take its place.
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
    """Return a batch of items spread over a data set or a loader's; any other sample as it is.

    `tune` repeats the largest item, for memory; gradients need items that differ.
    """
    loader = isinstance(sample, DataLoader)
    dataset = sample.dataset if loader else sample
    is_batched = not loader or sample.batch_size is not None or sample.batch_sampler is not None
    length = dataset_length(sample)
    if length is None or not is_batched or not hasattr(dataset, "__getitem__"):
        return sample
    if not isinstance(dataset, Dataset):
        return sample
    number = min(samples, length)
    collate = sample.collate_fn if loader else default_collate
    with random_state_kept():
        return collate([dataset[index * length // number] for index in range(number)])


def cut_batch(build: Callable[[int], Any], samples: int, cast: Callable[[Tensor], Tensor]) -> Rows:
    """Build a batch and find along which dimension of its tensors the samples lie.

    Raises:
        SampleError: along none.
    """
    batch, longer = map_tensors(cast, build(samples)), named_tensors(build(samples + 1))
    dims: dict[str | int, int | None] = {
        ".".join(path): _changed_dim(tensor.shape, longer[path].shape)
        for path, tensor in named_tensors(batch).items()
    }
    alone = tuple(dims) == ("",)  # a batch that is one tensor
    rows = rows_of(batch, batch_dims=dims[""] if alone else dims)
    if rows.size != samples:
        raise SampleError(
            f"a batch of {samples} samples has {rows.size} rows: pass a sample whose tensors all "
            "have one row for each of its samples"
        )
    return rows


def _changed_dim(one: Sequence[int], other: Sequence[int]) -> int | None:
    changed = [dim for dim, sizes in enumerate(zip(one, other, strict=True)) if len(set(sizes)) > 1]
    return changed[0] if len(changed) == 1 else None


def _invented(tensor: Tensor, seed: int) -> Tensor:
    """Return random values of a usual scale in a tensor's shape."""
    made = torch.zeros(tensor.shape, dtype=tensor.dtype, device="cpu")
    if not made.is_floating_point():
        return made
    generator = torch.Generator().manual_seed(seed)
    if made.dim() < 2:  # gains, biases and variances can all be near one
        return made.uniform_(0.5, 1.5, generator=generator)
    return made.normal_(0.0, made[0].numel() ** -0.5, generator=generator)
