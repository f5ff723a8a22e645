"""The training window: what runs between two optimizer updates, on any device.

Invariant: the window here is the loop that users write, with the same lifetimes: the old batch,
output and loss live until the new ones replace them, gradients accumulate over the micro-batches,
and `zero_grad` sets them to None after the step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from autobatch.errors import UsageError, WorkloadError
from autobatch.memory.trace import Phase
from autobatch.support.patching import patched

__all__ = [
    "AUTOCAST_DTYPES",
    "DefaultLoss",
    "Loss",
    "OptimizerSpec",
    "Phases",
    "Sharding",
    "Window",
    "Workload",
    "checked_loss",
    "run_windows",
]

Loss = Callable[[nn.Module, Any], Tensor]
OptimizerSpec = (
    torch.optim.Optimizer
    | type[torch.optim.Optimizer]
    | Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
)

Window = Callable[[nn.Module, torch.optim.Optimizer, Iterator[Any]], None]

Sharding = Literal["ddp", "fsdp"] | Callable[[nn.Module], object]

AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Everything that a training run does with memory.

    Attributes:
        model: the module to train; on any device, `meta` included; never moved or changed.
        batch: makes one micro-batch of n samples, any pytree of tensors, on the CPU.
        loss: `loss(model, batch)` gives a scalar tensor; None takes `.loss` (or its mean where it
            has one value a sample), a scalar output, or as a last resort the sum of the outputs.
        optimizer: an instance over the model's parameters, a class, or a callable on parameters.
        window: `window(model, optimizer, batches)` runs one training window of your own over the
            micro-batches that it is given, up to the optimizer's step and `zero_grad`; None runs
            the usual one. With it, `loss`, `autocast` and `clip_norm` are its own affair.
        evaluate: `evaluate(model, batch)`, run in eval mode without gradients after the windows.
        autocast: "bf16", "fp16" (with a GradScaler) or None.
        clip_norm: norm that gradients are clipped to before each step, or None.
        world_size: GPUs that train one model together; what is run and counted is rank 0's part.
        sharding: what they share: "ddp" (whole copies, and the buckets in which gradients are
            averaged), "fsdp" (FSDP2: `fully_shard` on each repeated block, then on the model), or a
            function that applies `fully_shard` to the model in a policy of its own; None is "ddp"
            on several GPUs and nothing on one.
        loss_name: how a plan names `loss` where it is given.
        sample_limit: most samples that one micro-batch can have, such as a dataset's length.
        notes: warnings that belong into the plan.
    """

    model: nn.Module
    batch: Callable[[int], Any]
    loss: Loss | None = None
    optimizer: OptimizerSpec = torch.optim.AdamW
    window: Window | None = None
    evaluate: Callable[[nn.Module, Any], Any] | None = None
    autocast: str | None = None
    clip_norm: float | None = None
    world_size: int = 1
    sharding: Sharding | None = None
    loss_name: str = "user"
    sample_limit: int | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raise UsageError for options that no run could have."""
        if self.autocast is not None and self.autocast not in AUTOCAST_DTYPES:
            raise UsageError(
                f"autocast is {self.autocast!r}: use one of {', '.join(AUTOCAST_DTYPES)}, or None"
            )
        if not callable(self.optimizer) and not isinstance(self.optimizer, torch.optim.Optimizer):
            raise UsageError(
                f"optimizer is {self.optimizer!r}: use an instance, a class such as "
                "torch.optim.AdamW, or a callable on parameters"
            )
        if self.loss is not None and not callable(self.loss):
            raise UsageError(f"loss is {self.loss!r}: use a function loss(model, batch), or None")
        if self.window is not None and (self.loss or self.autocast or self.clip_norm):
            raise UsageError(
                "a window function computes its own loss, casts and clips: leave out loss, "
                "autocast and clip_norm, or the window"
            )
        norm: Any = self.clip_norm
        if norm is not None and not (isinstance(norm, (int, float)) and norm > 0):
            raise UsageError(f"clip_norm is {norm!r}: use a positive norm, or None")
        ranks: Any = self.world_size
        if isinstance(ranks, bool) or not isinstance(ranks, int) or ranks < 1:
            raise UsageError(f"world_size is {ranks!r}: use a whole number of GPUs, at least 1")
        if self.sharding not in (None, "ddp", "fsdp") and not callable(self.sharding):
            raise UsageError(
                f"sharding is {self.sharding!r}: use 'ddp', 'fsdp', a function that applies "
                "torch.distributed.fsdp.fully_shard to the model, or None"
            )

    @property
    def shares(self) -> Literal["ddp", "fsdp", "custom"] | None:
        """How the GPUs share the model, by name; a function of the user's is "custom"."""
        if callable(self.sharding):
            return "custom"
        return self.sharding or ("ddp" if self.world_size > 1 else None)

    @property
    def is_sharded(self) -> bool:
        """Whether the GPUs share parameters, as FSDP2 does."""
        return self.shares in ("fsdp", "custom")


class Phases(Protocol):
    """Told where a run is; a device uses it to attribute memory."""

    def begin(self, phase: Phase, window: int = 0, micro_batch: int = 0) -> None:
        """A phase begins."""


def run_windows(
    workload: Workload,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: Callable[[nn.Module, Any], Tensor],
    batch: Callable[[], Any],
    accumulation_steps: int,
    windows: int,
    phases: Phases,
) -> None:
    """Run consecutive training windows, then the evaluation step if there is one.

    Args:
        workload: its options; the model, loss and optimizer are the device's own copies.
        model: the module on the device, in training mode.
        optimizer: over that module's parameters.
        loss: gives a scalar tensor for a micro-batch.
        batch: makes a micro-batch on the device.
        accumulation_steps: micro-batches between optimizer updates.
        windows: how many updates.
        phases: told where the run is.

    Raises:
        WorkloadError: the loss is no scalar tensor, or has no gradient; a window function left
            micro-batches out.
    """
    run = _usual_windows if workload.window is None else _own_windows
    inputs = run(workload, model, optimizer, loss, batch, accumulation_steps, windows, phases)
    if workload.evaluate is not None:
        phases.begin("evaluate", windows - 1, accumulation_steps - 1)
        with _evaluating(model), torch.no_grad(), _autocast(workload):
            workload.evaluate(model, inputs)


def _autocast(workload: Workload) -> contextlib.AbstractContextManager[Any]:
    dtype = AUTOCAST_DTYPES.get(workload.autocast or "")
    return contextlib.nullcontext() if dtype is None else torch.autocast("cuda", dtype=dtype)


def _usual_windows(
    workload: Workload,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: Loss,
    batch: Callable[[], Any],
    accumulation_steps: int,
    windows: int,
    phases: Phases,
) -> Any:
    """Run the loop that users write, and return the last micro-batch."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    # from its usual 2**16 on, a scaler skips the first steps of many runs, and with them the
    # optimizer's state
    scaler = torch.amp.GradScaler("cuda", init_scale=1.0, enabled=workload.autocast == "fp16")
    for window in range(windows):
        for step in range(accumulation_steps):
            phases.begin("inputs", window, step)
            inputs = batch()
            phases.begin("forward", window, step)
            with _autocast(workload):
                value = checked_loss(loss(model, inputs))
            value = scaler.scale(value / accumulation_steps)
            phases.begin("backward", window, step)
            value.backward()
        phases.begin("step", window, accumulation_steps - 1)
        if workload.clip_norm is not None:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(parameters, workload.clip_norm)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
    return inputs


def _own_windows(
    workload: Workload,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: Loss,
    batch: Callable[[], Any],
    accumulation_steps: int,
    windows: int,
    phases: Phases,
) -> Any:
    """Run the user's window function, told apart into phases by what it calls."""
    assert workload.window is not None
    drawn: list[Any] = [None]
    taken = 0

    def batches(window: int) -> Iterator[Any]:
        nonlocal taken
        for step in range(accumulation_steps):
            phases.begin("inputs", window, step)
            drawn[0] = batch()
            phases.begin("forward", window, step)
            taken += 1
            yield drawn[0]

    def backward(*args: Any, **kwargs: Any) -> None:
        phases.begin("backward", *divmod(taken - 1, accumulation_steps))
        original(*args, **kwargs)

    def step(*_: Any) -> None:
        phases.begin("step", *divmod(taken - 1, accumulation_steps))

    original = torch.autograd.backward
    hook = optimizer.register_step_pre_hook(step)
    try:
        with patched(torch.autograd, backward=backward):
            for window in range(windows):
                workload.window(model, optimizer, batches(window))
                if taken != (window + 1) * accumulation_steps:
                    raise WorkloadError(
                        f"the window function took {taken - window * accumulation_steps} of "
                        f"{accumulation_steps} micro-batches: it has to run over all it is given"
                    )
    finally:
        hook.remove()
    return drawn[0]


def checked_loss(value: Any) -> Tensor:
    """Return what a loss function gave, if a backward pass can begin with it.

    Raises:
        WorkloadError: it is no tensor, not a scalar, or has no gradient.
    """
    if not isinstance(value, Tensor):
        raise WorkloadError(
            f"the loss is a {type(value).__name__}, not a tensor: return the scalar loss from "
            "loss(model, batch)"
        )
    if value.dim() and value.numel() != 1:
        raise WorkloadError(
            f"the loss has shape {tuple(value.shape)}, not one value: reduce it, "
            "for instance with .mean()"
        )
    if not value.requires_grad:
        raise WorkloadError(
            "the loss has no gradient: check that parameters require gradients and that the loss "
            "was not detached or computed under no_grad"
        )
    return value


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    model.eval()
    try:
        yield
    finally:
        model.train()


class DefaultLoss:
    """Find a loss in what the model returns, and remember how.

    The output lives until the next one has been computed, as in the loops of most examples:
    `outputs = model(**batch)`, then `outputs.loss`.

    Attributes:
        kind: "output.loss", "mean of output.loss", "scalar output" or "surrogate sum"; None before
            the first call.
    """

    def __init__(self) -> None:
        self.kind: str | None = None
        self._output: Any = None

    def forget(self) -> None:
        """Let the last output go, as the end of a loop's function does."""
        self._output = None

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """Call the model on the batch and return the loss.

        Raises:
            WorkloadError: the model returns no floating-point tensor.
        """
        if isinstance(batch, Mapping):
            output = model(**batch)
        elif isinstance(batch, (list, tuple)):
            output = model(*batch)
        else:
            output = model(batch)
        self._output = output
        named = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if isinstance(named, Tensor):
            if named.numel() == 1:
                self.kind = "output.loss"
                return named
            self.kind = "mean of output.loss"  # one value a sample: a loop has to reduce it
            return named.mean()
        if isinstance(output, Tensor) and output.numel() == 1:
            self.kind = "scalar output"
            return output
        # registered pytrees do not cover every output class; a mapping's values do
        values = list(output.values()) if isinstance(output, Mapping) else output
        tensors = [
            leaf
            for leaf in tree_leaves(values)
            if isinstance(leaf, Tensor) and leaf.is_floating_point()
        ]
        if not tensors:
            raise WorkloadError(
                f"the model returns {type(output).__name__} without a floating-point tensor: "
                "pass loss=lambda model, batch: …"
            )
        self.kind = "surrogate sum"
        return self.stand_in(tensors)

    def stand_in(self, outputs: Sequence[Tensor]) -> Tensor:
        """Make a scalar of the floating-point outputs, where no loss is known."""
        total = outputs[0].sum()
        for output in outputs[1:]:
            total = total + output.sum()
        return total
