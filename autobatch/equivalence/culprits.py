"""Culprits in words: what each kind of cause is, and what the user can do about it."""

from __future__ import annotations

from collections.abc import Sequence

from autobatch.equivalence.result import Culprit
from autobatch.equivalence.weights import SUM

__all__ = [
    "batchnorm",
    "interacting_loss",
    "layer",
    "random_draws",
    "state",
    "unexplained",
    "unnamed_weight",
    "wrong_weight",
]


def random_draws(where: Sequence[str], difference: float) -> Culprit:
    """Return the culprit for random draws: window and batch draw different numbers."""
    return Culprit(
        kind="random",
        where=tuple(where),
        difference=difference,
        finding="two runs of one batch differ by their random numbers, as with dropout",
        advice="nothing: a window draws other numbers of the same distribution than the batch "
        "would; all else was compared with each draw replaced by its mean",
    )


def batchnorm(where: Sequence[str], difference: float) -> Culprit:
    """Return the culprit for BatchNorm, which normalises each micro-batch by itself."""
    return Culprit(
        kind="batchnorm",
        where=tuple(where),
        difference=difference,
        finding="a sample's output depends on the others of its micro-batch; the difference goes "
        "where these layers see one micro-batch at a time in the whole batch, too",
        advice="replace it by GroupNorm or LayerNorm, or freeze its statistics (layer.eval()); a "
        "larger micro-batch makes it smaller; SyncBatchNorm shares statistics between GPUs, not "
        "between accumulation steps",
    )


def layer(where: Sequence[str], difference: float) -> Culprit:
    """Return the culprit for other layers whose output for a sample depends on other samples."""
    return Culprit(
        kind="layer",
        where=tuple(where),
        difference=difference,
        finding="a sample's output depends on the others of its micro-batch; the difference goes "
        "where these layers see one micro-batch at a time in the whole batch, too",
        advice="train with the largest micro-batch that fits, or take a layer that treats each "
        "sample by itself",
    )


def state(where: Sequence[str], difference: float, steps: int) -> Culprit:
    """Return the culprit for state in the model that every forward pass changes."""
    return Culprit(
        kind="state",
        where=tuple(where),
        difference=difference,
        finding="the same input gives another output the second time: something that the model "
        "keeps changes with every forward pass",
        advice="update it once per optimizer step, or freeze it: this window runs "
        f"{steps} forward passes where the batch runs one",
    )


def wrong_weight(expression: str, weights: Sequence[float], difference: float) -> Culprit:
    """Return the culprit for a wrong weight, and the expression that gives the right one."""
    if expression == SUM:
        return Culprit(
            kind="weight",
            where=("the loss",),
            difference=difference,
            finding="the loss is a sum, not a mean: without any weight the gradients agree",
            advice='add the losses up as they are (reduction="sum" in autobatch.windows), or '
            "make the loss a mean",
        )
    return Culprit(
        kind="weight",
        where=(expression,),
        difference=difference,
        finding=f"the loss is a mean over {expression}: weighted by that "
        f"({_listed(weights)}) the gradients agree",
        advice=f"pass weight=lambda batch: {expression}",
    )


def unnamed_weight(weights: Sequence[float], difference: float) -> Culprit:
    """Return the culprit for weights that were fitted, and match nothing that was counted."""
    return Culprit(
        kind="weight",
        where=("the loss",),
        difference=difference,
        finding=f"weighted by {_listed(weights)} the gradients agree, but nothing that was counted "
        "in the batch gives these weights",
        advice="pass weight=lambda batch: … with what your loss is a mean over",
    )


def interacting_loss(share: float, difference: float) -> Culprit:
    """Return the culprit for a loss in which samples interact."""
    return Culprit(
        kind="loss",
        where=("the loss",),
        difference=difference,
        finding="what a sample adds to the loss depends on the values of other samples "
        f"({share:.1%} of it), as with in-batch negatives or the root of a mean: no weight makes "
        "that exact",
        advice="train with the largest micro-batch that fits, cache the gradients of the "
        "embeddings (GradCache, https://arxiv.org/abs/2101.06983), or keep a queue of negatives",
    )


def unexplained(difference: float) -> Culprit:
    """Return the culprit for a difference that no experiment explains."""
    return Culprit(
        kind="unexplained",
        where=(),
        difference=difference,
        finding="no random draw, state, module, weight or interaction that was tried explains it",
        advice="look for what depends on the size of a batch, such as a constant divisor, or for "
        "code that runs in the backward pass only",
    )


def _listed(weights: Sequence[float]) -> str:
    return ", ".join(f"{weight:.4g}" for weight in weights)
