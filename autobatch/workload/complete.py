"""A model and a user's options, completed to a workload.

Invariant: what the caller states wins over what a Workload says or what is inferred.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypedDict

import torch
from torch import nn

from autobatch.errors import UsageError
from autobatch.support.wording import near
from autobatch.workload.dataset import draw
from autobatch.workload.infer.infer import infer
from autobatch.workload.optimizers import mapped, named_optimizer
from autobatch.workload.sample import BatchDims, built
from autobatch.workload.workload import AUTOCAST_DTYPES, Loss, OptimizerSpec, Sharding, Workload

__all__ = ["Asked", "WorkloadOptions", "require_options"]

_DTYPES: dict[Any, str] = {dtype: name for name, dtype in AUTOCAST_DTYPES.items()}


class WorkloadOptions(TypedDict, total=False):
    """How a model trains, as `tune` takes it; what is left out is the Workload's own."""

    sample: Any
    batch_dims: BatchDims
    loss: Loss | None
    optimizer: OptimizerSpec | str | None
    autocast: str | torch.dtype | None
    clip_norm: float | None
    world_size: int
    sharding: Sharding | None


def require_options(function: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Refuse what is no option of how a model trains, as Python refuses an unknown argument.

    Args:
        function: the public one that was called; its own arguments are among the nearest names.
        options: what it was given beside its own arguments.

    Raises:
        TypeError: one of them is not known.

    >>> require_options(print, {"optimiser": "sgd"})
    Traceback (most recent call last):
        ...
    TypeError: print() got an unexpected keyword argument 'optimiser' (did you mean optimizer?)
    """
    known = WorkloadOptions.__annotations__.keys()
    for name in (name for name in options if name not in known):
        own = [own for own in inspect.signature(function).parameters if own != "options"]
        raise TypeError(
            f"{function.__name__}() got an unexpected keyword argument {name!r}"
            + near(name, [*own, *known])
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What a caller of `tune`, `predict` or `check_equivalence` says of the training.

    Attributes:
        model: the module to train, or a Workload; `devices/choose.py` calls a function that builds
            one.
        sample: one batch, a Dataset or a DataLoader; inferred if None.
        batch_dims: which dimension of the sample is the batch, as in `batch_builder`.
        loss: as in `Workload`, and so are the options below, or a criterion of (outputs, labels);
            None keeps the Workload's own.
        optimizer: an instance, a class, a callable on parameters, or a name such as "adamw"; or a
            list, tuple or dict of several.
        autocast: "bf16" or "fp16", or the dtype.
        clip_norm: norm that gradients are clipped to.
        world_size: GPUs that train one model together; 1 keeps the Workload's own.
        sharding: what these GPUs share.
    """

    model: Any
    sample: Any = None
    batch_dims: BatchDims = None
    loss: Loss | None = None
    optimizer: OptimizerSpec | str | None = None
    autocast: str | torch.dtype | None = None
    clip_norm: float | None = None
    world_size: int = 1
    sharding: Sharding | None = None

    def workload(self) -> Workload:
        """Complete what was asked with what can be inferred.

        Raises:
            UsageError: the model is none, or an option cannot be understood.
            SampleError: the sample is no batch, or there is none and it cannot be inferred.

        >>> asked = Asked(model=nn.Linear(3, 1), clip_norm=1.0)
        >>> asked.workload().batch(5).shape, asked.workload().clip_norm
        (torch.Size([5, 3]), 1.0)
        """
        workload = self._with_batches()
        stated: dict[str, Any] = {
            "loss": self.loss,
            "optimizer": self._optimizer(),
            "autocast": _DTYPES.get(self.autocast, self.autocast),
            "clip_norm": self.clip_norm,
            "world_size": None if self.world_size == 1 else self.world_size,
            "sharding": self.sharding,
        }
        changes = {name: value for name, value in stated.items() if value is not None}
        if self.loss is not None:
            changes["loss_name"] = "user"
        return replace(workload, **changes)

    def _optimizer(self) -> OptimizerSpec | None:
        given = self.optimizer
        if given is None:
            return None

        def known(one: Any) -> Any:
            return named_optimizer(one) if isinstance(one, str) else one

        return mapped(known, given)  # type: ignore[no-any-return]

    def _with_batches(self) -> Workload:
        """Return the model with a function that makes its batches."""
        model: Any = self.model
        if not isinstance(model, (nn.Module, Workload)):
            raise UsageError(
                f"model is a {type(model).__name__}: pass an nn.Module, an autobatch.Workload, "
                "or a function without arguments that builds one"
            )
        if self.sample is None and self.batch_dims is not None:
            raise UsageError("batch_dims describes a sample: pass sample= with it")
        if self.sample is None:
            return model if isinstance(model, Workload) else infer(model).workload(model)
        drawn = draw(self.sample)
        batch = built(drawn, self.batch_dims)
        workload = model if isinstance(model, Workload) else Workload(model=model, batch=batch)
        return replace(
            workload,
            batch=batch,
            sample_limit=drawn.limit,
            stream=tuple(built(each, self.batch_dims) for each in drawn.stream),
            notes=(*workload.notes, *batch.notes),
        )
