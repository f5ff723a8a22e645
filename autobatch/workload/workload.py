"""The record of what is trained.

Invariant: options that no run could have are refused when a Workload is made.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from autobatch.errors import UsageError
from autobatch.records.applied import AppliedLever
from autobatch.support.wording import argument, for_reader
from autobatch.workload.loss import as_loss
from autobatch.workload.optimizers import require_optimizers

__all__ = [
    "AUTOCAST_DTYPES",
    "Change",
    "Loss",
    "OptimizerSpec",
    "Sharding",
    "WindowFunction",
    "Workload",
]

Loss = Callable[[nn.Module, Any], Tensor]
OptimizerSpec = (
    torch.optim.Optimizer
    | type[torch.optim.Optimizer]
    | Callable[..., Any]
    | Sequence[Any]
    | Mapping[str, Any]
)
"""One optimizer, or what makes one of the parameters; or a list, tuple or dict of several."""

WindowFunction = Callable[[nn.Module, Any, Iterator[Any]], None]

Sharding = Literal["ddp", "fsdp"] | Callable[[nn.Module], object]

Change = Callable[[nn.Module], nn.Module | None]

AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Everything in a training run that decides how much memory it takes.

    Attributes:
        model: the module to train; on any device, `meta` included; never moved or changed.
        batch: makes one micro-batch of n samples, any pytree of tensors, on the CPU.
        loss: `loss(model, batch)` gives a scalar tensor, and a criterion of (outputs, labels) such
            as `nn.CrossEntropyLoss()` is made a function that does; None takes `.loss` (or its mean
            where it has one value a sample), a scalar output, or as a last resort the sum of the
            outputs.
        optimizer: an instance over the model's parameters, a class, or a callable on parameters (on
            named ones, or on the model, if its first argument is called `named_parameters` or
            `model`); or a list, tuple or dict of several, all of which step after a window. Any
            object that has `step`, `zero_grad` and `param_groups` is one.
        window: `window(model, optimizer, batches)` runs one training window of your own over the
            micro-batches that it is given, up to the optimizer's step and `zero_grad`; several
            optimizers come as the list or dict that they were given in. None runs the usual one. It
            computes its own loss, casts and clips, so `loss`, `autocast` and `clip_norm` are left
            out with it.
        evaluate: `evaluate(model, batch)`, run in eval mode without gradients after the windows.
        autocast: "bf16", "fp16" (with a GradScaler) or None.
        clip_norm: norm that gradients are clipped to before each step, or None.
        world_size: GPUs that train one model together; what is run and counted is rank 0's part.
        sharding: what they share: "ddp" (whole copies, and the buckets in which gradients are
            averaged), "fsdp" (FSDP2: `fully_shard` on each repeated block, then on the model), or a
            function that shares the model out in a policy of its own: it applies `fully_shard` or a
            tensor parallel plan to it, or returns it wrapped in FSDP1; None is "ddp" on several
            GPUs and nothing on one.
        gradient_as_bucket_view: whether DistributedDataParallel, which the workload has no wrapper
            of, lets gradients live in its buckets.
        loss_name: how a plan names `loss` where it is given.
        sample_limit: most samples that one micro-batch can have, such as a dataset's length.
        stream: makers of micro-batches of the other shapes that training has, as `batch` is one;
            what the allocator reserves in the course of all of them counts as reserved.
        changes: functions that are applied, in order, to the copy of the model that runs, before it
            is shared out and before optimizers are made; each changes the module in place, or
            returns another one. The model itself stays as it is.
        accumulates: whether a window may have several micro-batches; one whose optimizer steps in
            the backward pass may not.
        notes: what a plan made from this is to tell its user, such as what was inferred.
        levers: what `changes` and other options do, as a reader is told of it; none of it runs.
    """

    model: nn.Module
    batch: Callable[[int], Any]
    loss: Loss | None = None
    optimizer: OptimizerSpec = torch.optim.AdamW
    window: WindowFunction | None = None
    evaluate: Callable[[nn.Module, Any], Any] | None = None
    autocast: str | None = None
    clip_norm: float | None = None
    world_size: int = 1
    sharding: Sharding | None = None
    gradient_as_bucket_view: bool = False
    loss_name: str = "user"
    sample_limit: int | None = None
    stream: tuple[Callable[[int], Any], ...] = ()
    changes: tuple[Change, ...] = ()
    accumulates: bool = True
    notes: tuple[str, ...] = ()
    levers: tuple[AppliedLever, ...] = ()

    def __post_init__(self) -> None:
        """Raise UsageError for options that no run could have."""
        if self.autocast is not None and self.autocast not in AUTOCAST_DTYPES:
            raise UsageError(
                f"autocast is {self.autocast!r}: use one of {', '.join(AUTOCAST_DTYPES)}, or None"
            )
        require_optimizers(self.optimizer)
        if self.loss is not None and not callable(self.loss):
            raise UsageError(f"loss is {self.loss!r}: use a function loss(model, batch), or None")
        object.__setattr__(self, "loss", as_loss(self.loss))
        if self.window is not None and (self.loss or self.autocast or self.clip_norm):
            raise UsageError(
                "a window function computes its own loss, casts and clips: leave out loss, "
                f"{argument('autocast')} and {argument('clip_norm')}, or the window"
            )
        if not all(map(callable, self.changes)):
            raise UsageError("changes of a Workload are functions that take the copied model")
        norm: Any = self.clip_norm
        is_norm = isinstance(norm, (int, float)) and norm > 0 and math.isfinite(norm)
        if norm is not None and not is_norm:
            none = for_reader("None", "leave it out")
            named = f"{argument('clip_norm')} is {norm!r}"
            raise UsageError(f"{named}: use a positive norm that is finite, or {none}")
        ranks: Any = self.world_size
        if isinstance(ranks, bool) or not isinstance(ranks, int) or ranks < 1:
            raise UsageError(
                f"{argument('world_size')} is {ranks!r}: use a whole number of GPUs, at least 1"
            )
        if self.sharding not in (None, "ddp", "fsdp") and not callable(self.sharding):
            raise UsageError(
                f"sharding is {self.sharding!r}: use 'ddp', 'fsdp', a function that applies "
                "torch.distributed.fsdp.fully_shard to the model, or None"
            )

    @property
    def shares(self) -> Literal["ddp", "fsdp", "custom"] | None:
        """How the GPUs share the model, by name; a user's own function is "custom"."""
        if callable(self.sharding):
            return "custom"
        return self.sharding or ("ddp" if self.world_size > 1 else None)

    @property
    def is_sharded(self) -> bool:
        """Whether the GPUs share parameters, as FSDP2 does."""
        return self.shares in ("fsdp", "custom")
