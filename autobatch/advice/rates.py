"""How the learning rate follows the effective batch, and how to warm it up."""

from __future__ import annotations

import math
from typing import Literal

from autobatch.errors import UsageError
from autobatch.records.plan_record import PlanRecord

__all__ = [
    "LearningRateRule",
    "learning_rate",
    "learning_rate_factors",
    "learning_rate_rule",
    "scaled_rate",
    "warm_up",
]

LearningRateRule = Literal["linear", "sqrt"]

_SQRT = ("adam", "rmsprop")

# The sources: for SGD, for Adam and RMSprop, for the warm-up of Adam.
_GOYAL = "Goyal et al. 2017, https://arxiv.org/abs/1706.02677"
_MALLADI = "Malladi et al. 2022, https://arxiv.org/abs/2205.10287"
_MA = "Ma and Yarats 2021, https://arxiv.org/abs/1910.04209"


def learning_rate_rule(optimizer: str) -> LearningRateRule | None:
    """Return how the learning rate follows the effective batch for an optimizer's class name.

    Linear for SGD, with the square root for Adam and its variants and for RMSprop; None where no
    rule is established, or several optimizers have different ones.

    >>> learning_rate_rule("AdamW"), learning_rate_rule("SGD"), learning_rate_rule("Lion")
    ('sqrt', 'linear', None)
    >>> learning_rate_rule("Adam and RMSprop"), learning_rate_rule("Muon and AdamW")
    ('sqrt', None)
    """
    rules = {_rule_of(name) for name in optimizer.lower().replace(" and ", ", ").split(", ")}
    return rules.pop() if len(rules) == 1 else None


def _rule_of(name: str) -> LearningRateRule | None:
    if any(adaptive in name for adaptive in _SQRT):
        return "sqrt"
    return "linear" if name.startswith("sgd") else None


def scaled_rate(
    lr: float,
    *,
    from_batch: int,
    to_batch: int,
    optimizer: str,
    rule: Literal["auto"] | LearningRateRule = "auto",
) -> float:
    """Scale a learning rate from one effective batch to another.

    Args:
        lr: learning rate that was tuned for `from_batch`.
        from_batch: effective batch that it was tuned for, in samples per update.
        to_batch: effective batch to scale it to.
        optimizer: name of its class, which "auto" looks up.
        rule: "linear", "sqrt", or "auto", which is `learning_rate_rule`.

    Raises:
        UsageError: a number is not positive, the rule is unknown, or "auto" has none for the
            optimizer.

    >>> scaled_rate(0.1, from_batch=64, to_batch=256, optimizer="SGD")
    0.4
    >>> scaled_rate(1e-4, from_batch=64, to_batch=256, optimizer="AdamW")
    0.0002
    """
    for name, value in (("lr", lr), ("from_batch", from_batch), ("to_batch", to_batch)):
        if not 0 < value < math.inf:
            raise UsageError(f"{name} is {value!r}: use a positive number")
    if rule not in ("auto", "linear", "sqrt"):
        raise UsageError(f"rule is {rule!r}: use 'linear', 'sqrt' or 'auto'")
    chosen = learning_rate_rule(optimizer) if rule == "auto" else rule
    if chosen is None:
        raise UsageError(
            f"no rule is established for the learning rate of {optimizer}: try rule='linear' and "
            "rule='sqrt', and keep what trains better"
        )
    growth = to_batch / from_batch
    return lr * (growth if chosen == "linear" else math.sqrt(growth))


def learning_rate(plan: PlanRecord) -> str:
    """Say how to change the learning rate if it was tuned for another effective batch."""
    optimizer = plan.model.optimizer
    unchanged = (
        f"Accumulation alone changes nothing: if your learning rate was tuned for an effective "
        f"batch of {plan.effective_batch:,}, keep it."
    )
    rule = learning_rate_rule(optimizer)
    if rule == "linear":
        return (
            f"{unchanged} Otherwise scale it linearly with the effective batch, as for SGD: twice "
            f"the batch, twice the rate ({_GOYAL}). The rule breaks down for very large batches. "
            "`plan.scale_lr(lr, from_batch)` computes it."
        )
    if rule == "sqrt":
        return (
            f"{unchanged} Otherwise scale it with the square root of the effective batch, as for "
            f"{optimizer}: four times the batch, twice the rate ({_MALLADI}, who also move the "
            "betas and epsilon). `plan.scale_lr(lr, from_batch)` computes it."
        )
    return (
        f"{unchanged} Otherwise no rule is established for {optimizer}: SGD scales linearly "
        f"({_GOYAL}), Adam and RMSprop with the square root ({_MALLADI}); try both, with "
        '`plan.scale_lr(lr, from_batch, rule="linear")` and `rule="sqrt"`.'
    )


def warm_up(plan: PlanRecord) -> str:
    """Say over how many updates to raise the learning rate to its full value."""
    counted = "Count optimizer updates, not micro-batches: the schedule steps once per window."
    rule = learning_rate_rule(plan.model.optimizer)
    if rule == "linear":
        return (
            "Warm up a rate that was scaled: from the one it was scaled from, in equal steps over "
            f"the first 5 epochs ({_GOYAL}). {counted}"
        )
    if rule == "sqrt":
        return (
            "Warm up in equal steps from zero over 2 / (1 - beta2) updates, which is 2,000 at "
            f"Adam's usual beta2 of 0.999 ({_MA}). {counted}"
        )
    return f"Warm up as your optimizer's authors did. {counted}"


def learning_rate_factors(plan: PlanRecord) -> tuple[tuple[int, float], ...]:
    """Return pairs (effective batch of the tuned rate, factor on that rate), smallest first."""
    if learning_rate_rule(plan.model.optimizer) is None:
        return ()
    target = plan.effective_batch
    sizes = sorted({max(1, target // part) for part in (8, 4, 2, 1)})
    optimizer = plan.model.optimizer
    return tuple(
        (size, scaled_rate(1.0, from_batch=size, to_batch=target, optimizer=optimizer))
        for size in sizes
    )
