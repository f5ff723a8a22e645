"""Inputs tried in dry runs: on a copy of the model whose tensors are fake and take no memory.

Invariant: nothing that is computed on fake tensors outlives a dry run.
"""

from __future__ import annotations

import copy
import logging
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from autobatch.support.patching import patched
from autobatch.support.torch_private import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
    fake_tensor,
)
from autobatch.support.wording import one_line
from autobatch.workload.infer.fields import Fields, builder, describe, unknown
from autobatch.workload.loss import output_of

__all__ = ["TRIED_SAMPLES", "DryRun", "Refused", "fake_copy", "first_that_runs", "quiet"]

# Odd and prime, so that a wrong reshape of the batch seldom goes unnoticed.
TRIED_SAMPLES = 7

# Fake tensors up to this many elements keep their values where these are constants, such as what a
# model computes from the sizes of images.
KNOWN_ELEMENTS = 1024

# Raised where a model reads values, which fake tensors lack; on real ones it may well run.
CANNOT_TELL = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)


def fake_copy(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """Copy a module with fake CPU tensors in place of its own; ties between weights are kept."""
    fakes: dict[int, Any] = {}
    for module in model.modules():
        attributes = (value for value in vars(module).values() if isinstance(value, Tensor))
        for tensor in (*module._parameters.values(), *module._buffers.values(), *attributes):
            if tensor is None or id(tensor) in fakes:
                continue
            with mode:
                fake = torch.empty_strided(
                    tensor.size(), tensor.stride(), dtype=tensor.dtype, device="cpu"
                )
            is_parameter = isinstance(tensor, nn.Parameter)
            fakes[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if is_parameter else fake
    return copy.deepcopy(model, fakes)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what is said of building and trying a model: what matters comes in the real run."""
    loggers = [logging.getLogger(name) for name in ("transformers", fake_tensor.__name__)]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@dataclass(frozen=True, slots=True)
class Refused:
    """A model does not run on a batch.

    Attributes:
        why: what it was given and what happened.
        error: what the model raised; None where it ran, but mixed the samples.
        calls: how many calls of modules had returned by then, which tells how far it got.
    """

    why: str
    error: Exception | None
    calls: int


class DryRun:
    """A copy of a model with fake tensors, on which inputs are tried."""

    def __init__(self, model: nn.Module) -> None:
        """Copy the model.

        Raises:
            SampleError: the model cannot be copied.
        """
        self._mode = FakeTensorMode()
        try:
            self._clone = fake_copy(model, self._mode).train()
        except Exception as error:
            raise unknown(model, f"it cannot be copied: {one_line(error)}") from error
        self._calls = 0
        for module in self._clone.modules():
            module.register_forward_hook(self._count)

    def _count(self, *_: Any) -> None:
        self._calls += 1

    def run(self, fields: Fields) -> Any:
        """Return the fake output, or Refused where the model does not run or mixes the samples.

        None stands for the output of a model that reads values, which fake tensors lack.
        """
        self._calls = 0
        known = patched(fake_tensor, CONSTANT_NUMEL_LIMIT=KNOWN_ELEMENTS)
        try:
            with self._mode, torch.no_grad(), quiet(), _uncached(), known:
                output = output_of(self._clone, builder(fields)(TRIED_SAMPLES))
        except CANNOT_TELL:
            return None
        except Exception as error:
            why = f"on {describe(fields)} it raises {one_line(error)}"
            return Refused(why, error, self._calls)
        if not _keeps_samples(output):
            why = f"on {describe(fields)} the output {tuple(output.shape)} mixes the samples"
            return Refused(why, None, self._calls)
        return output


def _uncached() -> AbstractContextManager[None]:
    """Keep fake tensors out of transformers' caches, which outlive a model."""
    home = sys.modules.get("transformers.pytorch_utils")
    if not hasattr(home, "is_torchdynamo_compiling"):
        return nullcontext()
    return patched(home, is_torchdynamo_compiling=lambda: True)


def first_that_runs(model: nn.Module, candidates: Iterable[Fields]) -> tuple[Fields, Any]:
    """Return the first candidate on which the model runs, and its fake output.

    Raises:
        SampleError: the model runs on none of them.
    """
    why = "no layer tells what it takes"
    dry_run = DryRun(model)
    for fields in candidates:
        output = dry_run.run(fields)
        if not isinstance(output, Refused):
            return fields, output
        why = output.why
    raise unknown(model, why)


def _keeps_samples(output: Any) -> bool:
    """Say whether an output has one row per sample: `view(-1, 400)` accepts many wrong sizes."""
    scalar = not isinstance(output, Tensor) or output.dim() == 0
    return scalar or TRIED_SAMPLES in output.shape
