"""Training runs in which memory runs out at a chosen place, for one process and for several."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from autobatch import Window, Windows

STEPS, MICRO_BATCH, WINDOWS = 3, 4, 10
OOM = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 40 GiB"


class _Fails(torch.autograd.Function):
    """Runs out of memory in its backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise torch.OutOfMemoryError(OOM)


class Net(nn.Module):
    """A small model with buffers, which may run out of memory behind its first layer."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(5, 16, dtype=dtype)
        self.norm = nn.LayerNorm(16, dtype=dtype)
        self.register_buffer("scale", torch.ones(16, dtype=dtype))
        self.last = nn.Linear(16, 3, dtype=dtype)
        self.fails: str | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(torch.tanh(self.first(x))) * self.scale
        if self.fails == "forward":
            raise torch.OutOfMemoryError(OOM)
        if self.fails == "backward":
            x = _Fails.apply(x)
        return self.last(x)


def data(rank: int, samples: int = STEPS * MICRO_BATCH * WINDOWS) -> Tensor:
    random = torch.Generator().manual_seed(rank)
    return torch.randn(samples, 5, dtype=torch.float64, generator=random)


def optimizer_of(name: str, model: nn.Module) -> torch.optim.Optimizer:
    if name == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


class Stumble:
    """Runs out of memory at one micro-batch, a number of times, in one phase.

    `place` is "inputs" (before the model is called), "forward", "loss" (after it), "backward", or
    "step"; `window` and `index` say where; `times` how often in a row.
    """

    def __init__(self, place: str | None, window: int, index: int, times: int = 1) -> None:
        self.place, self.window, self.index, self.left = place, window, index, times
        self.shortages = 0
        self._seen: list[Tensor] = []

    def __call__(self, window: int, x: Tensor) -> str | None:
        """Say what fails for this micro-batch; it is known by its first sample."""
        if window == self.window and not any(torch.equal(x[0], seen) for seen in self._seen):
            self._seen.append(x[0].clone())
        at = next((i for i, seen in enumerate(self._seen) if torch.equal(x[0], seen)), None)
        if (
            window != self.window
            or at != self.index
            or not self.left
            or self.place in (None, "step")
        ):
            return None
        self.left -= 1
        self.shortages += 1
        return self.place


def train(
    model: nn.Module,
    inner: Net,
    run: Windows,
    optimizer: torch.optim.Optimizer,
    stumble: Stumble,
    each: Callable[[Window], None] = lambda window: None,
) -> list[str]:
    """Train for all windows of `run`, and return the warnings."""

    def loss(x: Tensor) -> Tensor:
        place = stumble(done, x)
        if place == "inputs":
            raise torch.OutOfMemoryError(OOM)
        inner.fails = place
        output = model(x)
        inner.fails = None
        if place == "loss":
            raise torch.OutOfMemoryError(OOM)
        return output.square().mean() + output.abs().mean()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for done, window in enumerate(run):
            window.run(loss)
            if stumble.place == "step" and done == stumble.window:
                _break_step(optimizer, stumble)
            window.step()
            each(window)
    return [str(warning.message) for warning in caught]


def _break_step(optimizer: torch.optim.Optimizer, stumble: Stumble) -> None:
    """Let the next steps fail; index 0 before anything changed, 1 in the middle, 2 at the end."""
    step = optimizer.step

    def failing(*args: Any, **kwargs: Any) -> Any:
        if not stumble.left:
            return step(*args, **kwargs)
        stumble.left -= 1
        stumble.shortages += 1
        if stumble.index == 1:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            kept = [p.grad for p in parameters[2:]]
            for p in parameters[2:]:
                p.grad = None
            step(*args, **kwargs)
            for p, grad in zip(parameters[2:], kept, strict=True):
                p.grad = grad
        if stumble.index == 2:
            step(*args, **kwargs)
        raise torch.OutOfMemoryError(OOM)

    optimizer.step = failing  # type: ignore[method-assign]
