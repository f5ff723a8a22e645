"""How the learning rate follows the effective batch."""

from __future__ import annotations

import math
from typing import Literal

from autobatch.plan import Plan

__all__ = [
    "LearningRateRule",
    "learning_rate",
    "learning_rate_factors",
    "learning_rate_rule",
    "scale_lr",
]

LearningRateRule = Literal["linear", "square root"]

_ADAPTIVE = ("adam", "rmsprop", "adagrad", "adafactor", "adadelta")


def learning_rate_rule(optimizer: str) -> LearningRateRule | None:
    """Return how the learning rate follows the effective batch for an optimizer's class name.

    Linear for SGD (Goyal et al. 2017), square root for adaptive optimizers (Krizhevsky 2014,
    Malladi et al. 2022); None where no rule is established.

    >>> learning_rate_rule("AdamW"), learning_rate_rule("SGD"), learning_rate_rule("Lion")
    ('square root', 'linear', None)
    """
    name = optimizer.lower()
    if any(adaptive in name for adaptive in _ADAPTIVE):
        return "square root"
    return "linear" if name.startswith("sgd") else None


def scale_lr(
    learning_rate: float, *, tuned_for: int, effective_batch: int, optimizer: str
) -> float:
    """Scale a learning rate from the effective batch it was tuned for to another one.

    Raises:
        ValueError: no rule is established for this optimizer.

    >>> scale_lr(0.1, tuned_for=64, effective_batch=256, optimizer="SGD")
    0.4
    >>> scale_lr(1e-4, tuned_for=64, effective_batch=256, optimizer="AdamW")
    0.0002
    """
    rule = learning_rate_rule(optimizer)
    if rule is None:
        raise ValueError(
            f"no rule scales the learning rate of {optimizer!r}: try the linear one and the "
            "square root, and keep what trains better"
        )
    growth = effective_batch / tuned_for
    return learning_rate * (growth if rule == "linear" else math.sqrt(growth))


def learning_rate(plan: Plan) -> str:
    """Say what the learning rate should do if the effective batch differs from the tuned one."""
    optimizer = plan.model.optimizer
    unchanged = (
        f"Accumulation alone changes nothing: if your learning rate was tuned for an effective "
        f"batch of {plan.effective_batch:,}, keep it."
    )
    rule = learning_rate_rule(optimizer)
    if rule == "linear":
        return (
            f"{unchanged} Otherwise scale it linearly with the effective batch, as for SGD: twice "
            "the batch, twice the rate, with a warm-up over the first epochs (Goyal et al. 2017, "
            "https://arxiv.org/abs/1706.02677). The rule breaks down for very large batches."
        )
    if rule == "square root":
        return (
            f"{unchanged} Otherwise scale it with the square root of the effective batch, as "
            f"{optimizer} is adaptive: four times the batch, twice the rate (Krizhevsky 2014, "
            "https://arxiv.org/abs/1404.5997; Malladi et al. 2022, "
            "https://arxiv.org/abs/2205.10287, who also move the betas and epsilon)."
        )
    return (
        f"{unchanged} Otherwise no rule is established for {optimizer}: SGD scales linearly "
        "(Goyal et al. 2017, https://arxiv.org/abs/1706.02677), adaptive optimizers with the "
        "square root (Krizhevsky 2014, https://arxiv.org/abs/1404.5997; Malladi et al. 2022, "
        "https://arxiv.org/abs/2205.10287); try both."
    )


def learning_rate_factors(plan: Plan) -> tuple[tuple[int, float], ...]:
    """Return (effective batch it was tuned for, factor on the learning rate), smallest first."""
    if learning_rate_rule(plan.model.optimizer) is None:
        return ()
    sizes = sorted({max(1, plan.effective_batch // part) for part in (8, 4, 2, 1)})
    return tuple(
        (
            size,
            scale_lr(
                1.0,
                tuned_for=size,
                effective_batch=plan.effective_batch,
                optimizer=plan.model.optimizer,
            ),
        )
        for size in sizes
    )
