"""Batches of random tensors, described field by field.

Invariant: a batch function makes plain CPU tensors, with the same numbers at every call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from autobatch.errors import SampleError
from autobatch.support.wording import for_reader
from autobatch.workload.workload import Loss, Workload

__all__ = [
    "SURROGATE",
    "Field",
    "Fields",
    "Inferred",
    "builder",
    "describe",
    "float_dtype",
    "pair",
    "unknown",
]

SURROGATE = "no loss is known, so the sum of the outputs stands in: give the real one as loss=…"


@dataclass(frozen=True, slots=True, kw_only=True)
class Inferred:
    """Inputs and loss for a model that came without them.

    Attributes:
        batch: builds one micro-batch of n samples on the CPU, in plain torch operations.
        inputs_note: what the inputs are and how they were found, in one line.
        loss: the loss of the model's usual training; None where the output holds it (`.loss`),
            or where nothing better is known than a sum of the outputs.
        loss_note: what the loss is and how it was found, in one line.
    """

    batch: Callable[[int], Any]
    inputs_note: str
    loss: Loss | None = None
    loss_note: str = SURROGATE

    def workload(self, model: nn.Module) -> Workload:
        """Return the workload of training `model` on these inputs."""
        notes = (self.inputs_note, self.loss_note)
        return Workload(
            model=model,
            batch=self.batch,
            loss=self.loss,
            loss_name="inferred",
            # a plan warns of a surrogate loss by itself
            notes=tuple(note for note in notes if note != SURROGATE),
        )


@dataclass(frozen=True, slots=True)
class Field:
    """A tensor of a batch: its shape without the batch dimension, and its values.

    Integers lie in [low, high); floating-point values are standard normal.

    Attributes:
        rows: entries of each sample in the batch dimension; several where the patches of all
            images follow one another.
        values: the values of each sample, in the order of `shape`, where random ones will not do,
            such as the sizes of an image; a simulated GPU knows them.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.int64
    high: int = 1
    low: int = 0
    batch_dim: int = 0
    rows: int = 1
    values: tuple[int, ...] = ()

    def make(self, n: int, generator: torch.Generator) -> Tensor:
        """Return the field of n samples."""
        if self.values:
            sample = torch.tensor(self.values, dtype=self.dtype, device="cpu")
            rows = sample.view(self.rows, *self.shape).expand(n, self.rows, *self.shape)
            return rows.reshape(n * self.rows, *self.shape)
        shape = (*self.shape[: self.batch_dim], n * self.rows, *self.shape[self.batch_dim :])
        if self.dtype.is_floating_point:
            return torch.randn(shape, dtype=self.dtype, device="cpu", generator=generator)
        if self.high == self.low + 1:  # a simulated GPU knows constants
            return torch.full(shape, self.low, dtype=self.dtype, device="cpu")
        return torch.randint(
            self.low, self.high, shape, dtype=self.dtype, device="cpu", generator=generator
        )

    def __str__(self) -> str:
        sizes = [str(size) for size in self.shape]
        sizes.insert(self.batch_dim, "n" if self.rows == 1 else f"{self.rows} n")
        return f"{str(self.dtype).removeprefix('torch.')} [{', '.join(sizes)}]"


Fields: TypeAlias = "Field | tuple[Field, ...] | Mapping[str, Field | bool]"


def unknown(model: nn.Module, why: str) -> SampleError:
    """Return the error that says why nothing was inferred and which argument to pass."""
    return SampleError(
        f"the inputs of {type(model).__name__} cannot be inferred ({why}): "
        + for_reader(
            "pass one batch, such as sample=torch.randn(8, 3, 224, 224) or sample=(inputs, labels)",
            "let the function that SPEC names return an autobatch.Workload(model=..., batch=...)",
        )
    )


def builder(fields: Fields) -> Callable[[int], Any]:
    """Return a batch function that draws the same random numbers at every call."""

    def build(n: int) -> Any:
        generator = torch.Generator().manual_seed(0)
        if isinstance(fields, Field):
            return fields.make(n, generator)
        if isinstance(fields, tuple):
            return tuple(field.make(n, generator) for field in fields)
        return {
            name: field.make(n, generator) if isinstance(field, Field) else field
            for name, field in fields.items()
        }

    return build


def describe(fields: Fields) -> str:
    """Return names, dtypes and shapes in one line."""
    if isinstance(fields, Field):
        return str(fields)
    if isinstance(fields, tuple):
        return ", ".join(str(field) for field in fields)
    return ", ".join(f"{name} {field}" for name, field in fields.items())


def float_dtype(model: nn.Module) -> torch.dtype:
    """Return the dtype of a model's floating-point weights; of several, the first."""
    dtypes = (p.dtype for p in model.parameters() if p.dtype.is_floating_point)
    return next(dtypes, torch.get_default_dtype())


def pair(size: Any) -> tuple[int, int]:
    """Return height and width of a size that may be one number for both."""
    height, width = size if isinstance(size, Sequence) else (size, size)
    return int(height), int(width)
