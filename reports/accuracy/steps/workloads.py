"""The workloads of steps: models on `meta`, nothing downloaded, windows as scripts have them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from autobatch.workload.workload import AUTOCAST_DTYPES, WindowFunction, Workload
from reports.accuracy.steps import course
from reports.accuracy.steps.configuration import Step
from reports.accuracy.steps.course_own import OwnTransformer
from reports.accuracy.steps.titan_runs import titan_workload
from reports.accuracy.steps.transformers_workloads import docs_workload, tuning_workload

Builder = Callable[[Step], Workload]


def course_workload(step: Step) -> Workload:
    """Build the workload of course code."""
    told = step.options
    shapes = {name: told[name] for name in ("vocabulary", "width", "layers", "heads", "inner")}
    with torch.device("meta"):
        kind = OwnTransformer if told["model"] == "own" else course.CourseTransformer
        model = kind(
            length=told.get("context") or told["length"], segment=told["segment"], **shapes
        )

    def batch(n: int) -> Any:
        return tuple(torch.randint(told["vocabulary"], (n, told["length"])) for _ in range(2))

    make = _COURSE_OPTIMIZERS[told["optimizer"]]
    if told["sharded_optimizer"]:
        inner, world_size = make, step.world_size

        def make(parameters: Any) -> torch.optim.Optimizer:
            return course.ShardedOptimizer(parameters, inner, world_size)

    return Workload(model=model, batch=batch, optimizer=make, window=_course_window(told))


def _torch_adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3)


def _single_adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3, foreach=False)


_COURSE_OPTIMIZERS: Mapping[str, Callable[[Any], torch.optim.Optimizer]] = {
    "course": course.CourseAdamW,
    "torch": _torch_adamw,
    "torch single": _single_adamw,
}


def _course_window(told: Mapping[str, Any]) -> WindowFunction:
    dtype = AUTOCAST_DTYPES.get(told["autocast"] or "")
    loss_of = course.cross_entropy if told["loss"] == "course" else course.torch_cross_entropy
    kept: WeakKeyDictionary[Any, SimpleNamespace] = WeakKeyDictionary()

    def autocast() -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if dtype is None else torch.autocast("cuda", dtype=dtype)

    def forward_alone(model: nn.Module, optimizer: Any, batches: Any) -> None:
        for tokens, _ in batches:
            with torch.set_grad_enabled(told["keeps_graph"]), autocast():
                model(tokens)

    def train(model: nn.Module, optimizer: Any, batches: Any) -> None:
        alive = kept.setdefault(optimizer, SimpleNamespace())
        first = SimpleNamespace() if not told["keeps_variables"] else alive
        for tokens, targets in batches:
            if told["zero_grad"] == "start":
                optimizer.zero_grad(set_to_none=True)
            with autocast():
                first.logits = model(tokens)
                first.loss = loss_of(first.logits, targets)
            if told["zero_grad"] == "after forward":
                optimizer.zero_grad(set_to_none=True)
            first.loss.backward()
            optimizer.step()

    return forward_alone if told["window"] == "forward" else train


BUILDERS: Mapping[str, Builder] = {
    "course": course_workload,
    "docs": docs_workload,
    "tuning": tuning_workload,
    "titan": titan_workload,
}
