"""Culprits in words: what each cause of a difference is, and what the user can do about it."""

from __future__ import annotations

from collections.abc import Sequence

from autobatch.equivalence.result import Culprit, Kind

__all__ = ["culprit"]

_MIXES = (
    "a sample's output depends on the others of its micro-batch; the difference goes where these "
    "layers see one micro-batch at a time in the whole batch, too"
)
_WORDS: dict[str, tuple[Kind, str, str]] = {
    "random": (
        "random",
        "two runs of one batch differ by their random numbers, as with dropout",
        "nothing: a window draws other numbers of the same distribution than the batch would; all "
        "else was compared with each draw replaced by its mean",
    ),
    "batchnorm": (
        "batchnorm",
        _MIXES,
        "replace it by GroupNorm or LayerNorm, or freeze its statistics (layer.eval()); a larger "
        "micro-batch makes it smaller; SyncBatchNorm shares statistics between GPUs, not between "
        "accumulation steps",
    ),
    "layer": (
        "layer",
        _MIXES,
        "train with the largest micro-batch that fits, or take a layer that treats each sample by "
        "itself",
    ),
    "state": (
        "state",
        "the same input gives another output the second time: something that the model keeps "
        "changes with every forward pass",
        "update it once per optimizer step, or freeze it: this window runs {steps} forward passes "
        "where the batch runs one",
    ),
    "sum": (
        "weight",
        "the loss is a sum, not a mean: without any weight the gradients agree",
        'add the losses up as they are (reduction="sum" in autobatch.windows), or make the loss a '
        "mean",
    ),
    "weight": (
        "weight",
        "the loss is a mean over {where}: weighted by that ({weights}) the gradients agree",
        "pass weight=lambda batch: {where}",
    ),
    "unnamed weight": (
        "weight",
        "weighted by {weights} the gradients agree, but nothing that was counted in the batch "
        "gives these weights",
        "pass weight=lambda batch: … with what your loss is a mean over",
    ),
    "loss": (
        "loss",
        "what a sample adds to the loss depends on the values of other samples ({share:.1%} of "
        "it), as with in-batch negatives or the root of a mean: no weight makes that exact",
        "train with the largest micro-batch that fits, cache the gradients of the embeddings "
        "(GradCache, https://arxiv.org/abs/2101.06983), or keep a queue of negatives",
    ),
    "unexplained": (
        "unexplained",
        "no random draw, state, module, weight or interaction that was tried explains it",
        "look for what depends on the size of a batch, such as a constant divisor, or for code "
        "that runs in the backward pass only",
    ),
}
"""By cause: the kind of the culprit, what was found, and what to do."""


def culprit(
    cause: str,
    where: Sequence[str],
    difference: float,
    *,
    weights: Sequence[float] = (),
    **more: float,
) -> Culprit:
    """Return the culprit for a cause.

    Args:
        cause: a key of the words above.
        where: names of the modules, or the expression or part concerned.
        difference: between the gradients while all other causes are removed.
        weights: of the micro-batches, with which the gradients agree.
        more: the other numbers in the words: `steps` of a window, `share` of an interaction.
    """
    kind, finding, advice = _WORDS[cause]
    words = {"where": ", ".join(where), "weights": ", ".join(f"{w:.4g}" for w in weights), **more}
    return Culprit(
        kind=kind,
        where=tuple(where),
        difference=difference,
        finding=finding.format_map(words),
        advice=advice.format_map(words),
    )
