"""Culprits in words: what each cause of a difference is, and what the user can do about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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
        "else was compared with the same numbers for each sample",
    ),
    "hook": (
        "hook",
        "a hook changes gradients in the backward pass, and not in proportion: without hooks the "
        "difference is another",
        "change the gradient once per window, after the last micro-batch and before the step",
    ),
    "step": (
        "hook",
        "a hook steps an optimizer in the backward pass, so that the parameters change with every "
        "micro-batch; what was compared is the whole change",
        "step once per window, after the last micro-batch",
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
        "weighted by {weights} the gradients agree, but nothing that was counted gives such "
        "weights in batches with other counts, too: which weight it is, is not known",
        "pass weight=lambda batch: … with what your loss is a mean over",
    ),
    "hidden weight": (
        "weight",
        "equivalent for samples of equal counts alone: {part} {what}, the gradients differ, and "
        "weighted by {where} they agree",
        "pass weight=lambda batch: {where}",
    ),
    "hidden unnamed": (
        "weight",
        "equivalent for samples of equal counts alone: {part} {what}, the gradients differ, and "
        "weighted by {weights} they agree; which weight that is, is not known",
        "pass weight=lambda batch: … with what your loss is a mean over, such as the class weights "
        "of its labels",
    ),
    "hidden loss": (
        "loss",
        "equivalent for samples of equal counts alone: {part} {what}, the gradients differ, and "
        "no weight of the micro-batches makes them agree",
        "let every term of the loss be a mean over samples, or divide it by a constant",
    ),
    "hidden outputs": (
        "loss",
        "equivalent at the outputs that the model has now alone: where some samples have learned "
        "and others have not, the gradients differ, as of a mean over what outputs select (hard "
        "examples, triplets that are active, sure labels) or of a threshold on a batch's mean",
        "let every term of the loss be a mean over all samples, or divide it by a constant; else "
        "train with the largest micro-batch that fits",
    ),
    "hidden length": (
        "layer",
        "equivalent for samples of equal lengths alone: with all samples but one half as long by "
        "{where}, the gradients differ, because what a sample gives depends on how long the "
        "longest of its micro-batch is",
        "take means over each sample's own entries alone, by its mask or length, or cut and pad "
        "all batches to the same length",
    ),
    "undecided side": (
        "undecided",
        "with all samples but one half as long by {where}, the gradients differ where the padding "
        "comes last and agree where it comes first, and the sample has none",
        "give a sample with padding, as in training",
    ),
    "undecided length": (
        "undecided",
        "with all samples but one half as long by {where}, the gradients differ, but random "
        "numbers were drawn whose share for each sample is unknown",
        "check once more without them, such as with a probability of 0",
    ),
    "undecided": (
        "undecided",
        "the gradients differ, but random numbers were drawn whose share for each sample is "
        "unknown, and no experiment shows another cause",
        "check once more without them, such as with a probability of 0, or draw them from PyTorch "
        "with one row for each sample",
    ),
    "own weight": (
        "weight",
        "micro-batches of equal size agree with their batch, and unequal ones do not: each counts "
        "as much as any other",
        "weight each micro-batch's loss by its share of the window's samples or tokens",
    ),
    "own count": (
        "weight",
        "equivalent for samples of equal counts alone: {part} {what}, the gradient with which the "
        "window function steps is not that of its batch",
        "divide the losses of all micro-batches by what they count together, such as the labels of "
        "the window that are not ignored",
    ),
    "own update": (
        "unexplained",
        "the gradient with which the window function steps is not that of the loss of its batch, "
        "but it is the same where the function gets the whole batch at once",
        "look for a factor that is missing or too much; where the function means to step with "
        "another gradient than that of the loss, as SAM does, leave the loss out of the check",
    ),
    "own window": (
        "unexplained",
        "the gradient with which the window function steps is not that of its batch",
        "check the loss by itself, without the window function: that finds whether the model, the "
        "loss or the loop is the cause; in the loop, look for a divisor, for zero_grad and for "
        "gradients from before the window",
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
    words: Mapping[str, str] | None = None,
    **more: float,
) -> Culprit:
    """Return the culprit for a cause.

    Args:
        cause: a key of the words above.
        where: names of the modules, or the expression or part concerned.
        difference: between the gradients while all other causes are removed.
        weights: of the micro-batches, with which the gradients agree.
        words: more words: the `part` of a batch, and `what` it held.
        more: numbers in the words: `steps` of a window, `share` of an interaction.
    """
    kind, finding, advice = _WORDS[cause]
    numbers = ", ".join(f"{weight:.4g}" for weight in weights)
    named = {"where": ", ".join(where), "weights": numbers, **(words or {}), **more}
    return Culprit(
        kind=kind,
        where=tuple(where),
        difference=difference,
        finding=finding.format_map(named),
        advice=advice.format_map(named),
    )
