"""Workloads whose steps reach and change objects of every kind, with a module's globals."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

WIDTH = 16
MAKERS: dict[str, Callable[[], dict[str, Any]]] = {}

TABLE = torch.linspace(0.9, 0.1, 50)
LOG: list[Any] = []
CALLS = 0
STATE: dict[str, Any] = {}


class Schedule:
    """A noise schedule that moves its table to where it is used."""

    shared = torch.ones(WIDTH)

    def __init__(self) -> None:
        self.alphas = torch.linspace(0.9, 0.1, 50)

    def noised(self, x: Tensor) -> Tensor:
        self.alphas = self.alphas.to(x.device) * 1.0
        t = torch.randint(0, 50, (x.shape[0],), device=x.device)
        return x * self.alphas[t].view(-1, 1)

    def by_class(self, x: Tensor) -> Tensor:
        Schedule.shared = Schedule.shared.to(x.device) + 1
        return x * Schedule.shared


class Slotted:
    __slots__ = ("calls", "table")

    def __init__(self) -> None:
        self.table, self.calls = torch.ones(WIDTH), 0


GLOBAL_SCHEDULE = Schedule()


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))


def square(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def workload(make: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
    MAKERS[make.__name__] = make
    return make


@workload
def schedule_in_a_closure() -> dict[str, Any]:
    schedule = Schedule()
    return {"loss": lambda model, x: square(model, schedule.noised(x))}


@workload
def schedule_as_a_global() -> dict[str, Any]:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return square(model, GLOBAL_SCHEDULE.noised(x))

    return {"loss": loss}


@workload
def schedule_in_an_object_with_slots() -> dict[str, Any]:
    held = Slotted()

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        held.table = held.table.to(x.device) * 2
        held.calls += 1
        return square(model, x * held.table)

    return {"loss": loss}


@workload
def attribute_of_a_class() -> dict[str, Any]:
    schedule = Schedule()
    return {"loss": lambda model, x: square(model, schedule.by_class(x))}


@workload
def global_that_is_rebound() -> dict[str, Any]:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        global TABLE, CALLS
        TABLE = TABLE.to(x.device) * 1.0
        CALLS += 1
        return square(model, x) * TABLE.mean()

    return {"loss": loss}


@workload
def lists_and_dicts_of_a_module() -> dict[str, Any]:
    def log(value: Tensor) -> Tensor:  # reached through another function alone
        LOG.append(value.detach())
        STATE.setdefault("seen", []).append(value)
        return value

    return {"loss": lambda model, x: log(square(model, x))}


@workload
def counter_by_nonlocal() -> dict[str, Any]:
    count, last = 0, None

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        nonlocal count, last
        count += 1
        last = square(model, x)
        return last

    return {"loss": loss}


@workload
def attribute_of_the_function() -> dict[str, Any]:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        loss.calls += 1
        loss.last = square(model, x)
        return loss.last

    loss.calls = 0
    return {"loss": loss}


@workload
def default_arguments() -> dict[str, Any]:
    def loss(model: nn.Module, x: Tensor, seen: list[Any] = [], *, table=torch.ones(WIDTH)):  # noqa: B006, B008
        seen.append(x)
        table.mul_(0.5)
        return square(model, x * table.to(x.device))

    return {"loss": loss}


@workload
def average_made_at_the_first_window() -> dict[str, Any]:
    model, kept = net(), {}

    def window(model: nn.Module, optimizer: Any, batches: Any) -> None:
        if not kept:
            kept["ema"] = AveragedModel(model)
        for x in batches:
            square(model, x).backward()
        optimizer.step()
        optimizer.zero_grad()
        kept["ema"].update_parameters(model)

    return {"model": model, "window": window}


@workload
def average_by_deepcopy() -> dict[str, Any]:
    model = net()
    average = copy.deepcopy(model).requires_grad_(False)

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        with torch.no_grad():
            for ours, theirs in zip(average.parameters(), model.parameters(), strict=True):
                ours.lerp_(theirs, 0.1)
        return (model(x) - average(x) + 1).square().mean()

    return {"model": model, "loss": loss}


@workload
def teacher_in_a_list_of_an_object() -> dict[str, Any]:
    class Trainer:
        def __init__(self) -> None:
            self.parts = {"teachers": [net().requires_grad_(False)]}
            self.steps = 0

        def compute(self, model: nn.Module, x: Tensor) -> Tensor:
            self.steps += 1
            return (model(x) - self.parts["teachers"][0](x)).square().mean()

    return {"loss": Trainer().compute}


@workload
def callable_object() -> dict[str, Any]:
    class Loss:
        def __init__(self) -> None:
            self.teacher, self.history = net(), deque(maxlen=3)

        def __call__(self, model: nn.Module, x: Tensor) -> Tensor:
            value = (model(x) - self.teacher(x).detach()).square().mean()
            self.history.append(value.item())
            self.teacher.train(not self.teacher.training)
            return value

    return {"loss": Loss()}


@workload
def partial_with_state() -> dict[str, Any]:
    def loss(seen: list[Any], model: nn.Module, x: Tensor, *, table: Tensor) -> Tensor:
        seen.append(x)
        return square(model, x * table.add_(1))

    return {"loss": functools.partial(loss, [], table=torch.ones(WIDTH))}


@workload
def dataclass_of_tensors() -> dict[str, Any]:
    @dataclasses.dataclass
    class Config:
        scale: Tensor
        steps: int = 0

    config = Config(torch.ones(WIDTH))

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        config.scale = config.scale.to(x.device)
        config.steps += 1
        return square(model, x * config.scale)

    return {"loss": loss}


@workload
def optimizer_in_the_backward_pass() -> dict[str, Any]:
    model = net()
    parts = {p: torch.optim.AdamW([p]) for p in model.parameters()}

    def update(parameter: Tensor) -> None:
        parts[parameter].step()
        parts[parameter].zero_grad()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(update)

    def window(model: nn.Module, optimizer: Any, batches: Any) -> None:
        for x in batches:
            square(model, x).backward()

    return {"model": model, "window": window, "optimizer": lambda p: torch.optim.SGD(p, lr=0.0)}


@workload
def hooks_that_append() -> dict[str, Any]:
    model, seen = net(), []
    model[0].register_forward_hook(lambda module, args, output: seen.append(output))
    model[0].weight.register_hook(lambda gradient: seen.append(gradient))
    model[2].register_full_backward_hook(lambda *parts: seen.append(parts))
    return {"model": model, "loss": square}


@workload
def schedule_and_average_in_step_hooks() -> dict[str, Any]:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    average = AveragedModel(model)
    optimizer.register_step_post_hook(lambda *_: schedule.step())
    optimizer.register_step_post_hook(lambda *_: average.update_parameters(model))
    return {"model": model, "loss": square, "optimizer": optimizer}


@workload
def second_optimizer_in_a_closure() -> dict[str, Any]:
    model = net()
    other = torch.optim.Adam(model[0].parameters())

    def window(model: nn.Module, optimizer: Any, batches: Any) -> None:
        for x in batches:
            square(model, x).backward()
        other.step()
        optimizer.step()
        optimizer.zero_grad()

    return {"model": model, "window": window}


@workload
def generator_of_random_numbers() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    rows = itertools.count()

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        torch.rand(3, generator=generator)
        next(rows)
        return square(model, x)

    return {"loss": loss}


@workload
def cached_function() -> dict[str, Any]:
    @functools.lru_cache
    def mask(width: int) -> Tensor:
        return torch.ones(width, device="cuda" if torch.cuda.is_available() else "cpu")

    return {"loss": lambda model, x: square(model, x * mask(WIDTH))}


@workload
def counter_of_the_batches() -> dict[str, Any]:
    drawn: list[int] = []

    def batch(n: int) -> Tensor:
        drawn.append(n)
        return torch.ones(n, WIDTH)

    return {"batch": batch, "loss": square}


@workload
def step_that_raises() -> dict[str, Any]:
    schedule, seen = Schedule(), []

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        seen.append(schedule.noised(x))
        if len(seen) > 2:
            raise ValueError("broken")
        return square(model, x)

    return {"loss": loss}
