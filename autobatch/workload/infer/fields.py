"""Batches of random tensors, described field by field.

Invariant: a batch function makes the same numbers at every call, and plain CPU tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from autobatch.errors import SampleError
from autobatch.workload.workload import Workload

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

Loss: TypeAlias = Callable[[nn.Module, Any], Tensor]

SURROGATE = "no loss is known, so the sum of the outputs stands in: pass loss=... for the real one"


@dataclass(frozen=True, slots=True, kw_only=True)
class Inferred:
    """Inputs and loss for a model that came without them.

    Attributes:
        batch: builds one micro-batch of n samples on the CPU, in plain torch operations.
        loss: the loss of the model's usual training; None where the output holds it (`.loss`)
            or nothing better is known than a sum of the outputs.
        note: what the inputs are and how that was found, in one line.
        loss_note: the same of the loss.
    """

    batch: Callable[[int], Any]
    loss: Loss | None
    note: str
    loss_note: str

    def workload(self, model: nn.Module) -> Workload:
        """Return the workload of training `model` on these inputs."""
        notes = tuple(note for note in (self.note, self.loss_note) if note != SURROGATE)
        return Workload(
            model=model, batch=self.batch, loss=self.loss, loss_name="inferred", notes=notes
        )


@dataclass(frozen=True, slots=True)
class Field:
    """A tensor of a batch: its shape without the batch dimension, and its values.

    Integers lie in [low, high); floating-point values are standard normal.

    Attributes:
        rows: that each sample has in the batch dimension, as where patches of all images follow
            one another.
        values: of each sample, in the order of `shape`, where not any will do: the sizes of an
            image, say. Known on a simulated GPU.
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
        if self.high == self.low + 1:  # unlike random numbers, known on a simulated GPU
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
    """Return the error that shows the missing argument."""
    return SampleError(
        f"the inputs of {type(model).__name__} cannot be inferred ({why}): pass one batch, such "
        "as sample=torch.randn(8, 3, 224, 224) or sample=(inputs, labels)"
    )


def builder(fields: Fields) -> Callable[[int], Any]:
    """Return a batch function with its own random numbers, the same for every call."""

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
    """Return the dtype of a model's floating-point weights, the first where they differ."""
    dtypes = (p.dtype for p in model.parameters() if p.dtype.is_floating_point)
    return next(dtypes, torch.get_default_dtype())


def pair(size: Any) -> tuple[int, int]:
    """Return height and width, where one number is both."""
    height, width = size if isinstance(size, Sequence) else (size, size)
    return int(height), int(width)
