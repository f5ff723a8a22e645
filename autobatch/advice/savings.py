"""What is held at the peak that training may do without: copies, masks, parts that do not learn.

Invariant: only what the records show is named, with its bytes, and no block of memory is named
twice; whether it can go is the user's to say, so every sentence says "may".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Literal

from autobatch.records.holders import Holder, Lives, PeakBlocks
from autobatch.records.plan_record import PlanRecord
from autobatch.support.units import format_bytes

__all__ = ["Saving", "savings_of"]

_WORTH = 0.01
"""The share of the peak below which nothing is said."""

_HALF = ("bfloat16", "float16")

_MASKING = frozenset(
    "bitwise_and bitwise_or clone expand full logical_and logical_not logical_or masked_fill "
    "repeat tril triu where _to_copy add mul rsub".split()
)
"""Ops that make masks; dropout and activations keep masks of their own, which they need."""

_ATTENTION = re.compile(r"scaled_dot_product|^_(safe_)?softmax$")
"""Ops of attention."""

_FLOATS = (*_HALF, "float32", "float64")

_OF_SCORES = frozenset(
    "_log_softmax _log_softmax_backward_data nll_loss_backward nll_loss2d_backward clone "
    "_to_copy".split()
)
"""Ops of a loss, whose results of the shape of scores are scores or their gradients."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Saving:
    """Memory that may not be needed.

    Attributes:
        kind: "scores" of classes held more than once, "upcast" copies of half-precision tensors,
            an expanded "mask", or activations of "frozen" modules.
        size_bytes: at the peak, of what may go; each tensor is in one saving alone.
        modules: in which it is, most bytes first.
        text: what is held, and what to try.
        brief: the same in one short line.
    """

    kind: Literal["scores", "upcast", "mask", "frozen"]
    size_bytes: int
    modules: tuple[str, ...]
    text: str
    brief: str


def savings_of(plan: PlanRecord) -> tuple[Saving, ...]:
    """Return what may go of a plan's peak, most bytes first."""
    blocks = [
        each
        for each in plan.peak_blocks
        if each.holder.category in ("activations", "temporaries") and each.holder.dtype
    ]
    least = _WORTH * plan.footprint.peak_allocated_bytes
    found = []
    for search in (_scores, _masks, _upcasts, _frozen):
        saving, named = search(blocks, plan)
        # a cast of scores is theirs, so that it is not named again as a copy in float32
        blocks = [each for each in blocks if each not in named]
        if saving is not None and saving.size_bytes >= least:
            found.append(saving)
    return tuple(sorted(found, key=lambda saving: -saving.size_bytes))


_Found = tuple[Saving | None, list[PeakBlocks]]
"""What was found, and the blocks that it is about."""


def _scores(blocks: list[PeakBlocks], plan: PlanRecord) -> _Found:
    """Find scores of classes, such as a language model's logits, that are alive more than once."""
    largest = max(
        (each for each in blocks if each.holder.op == "_log_softmax"),
        key=lambda each: each.size_bytes,
        default=None,
    )
    if largest is None:
        return None, []
    shape = largest.holder.shape
    like = [each for each in blocks if _is_like(each.holder, shape)]
    held = [each for each in like if each.holder.op in _OF_SCORES]
    held += _logits(like, largest.holder, plan.lives)
    count = sum(each.count for each in held)
    if count < 2:
        return None, held
    total = _total(held)
    least = min(each.size_bytes // each.count for each in held)
    has_gradients = any(each.holder.phase == "backward" for each in held)
    counted = ", gradients counted" if has_gradients else ""
    classes = _classes(shape, held)
    scores = "scores of classes" if classes is None else f"scores of {classes:,} classes"
    saving = Saving(
        kind="scores",
        size_bytes=total - least,
        modules=_modules(held),
        text=(
            f"{scores} are held {count} times at the peak{counted}, "
            f"{format_bytes(total)} together{_in(held)}: a loss that is computed in chunks may "
            "need only a part of it at once"
        ),
        brief=f"{scores} are held {count} times: try a loss in chunks",
    )
    return saving, held


def _is_like(holder: Holder, shape: tuple[int, ...]) -> bool:
    """Whether a tensor has the shape of scores; rows by classes may be split or shifted."""
    if not holder.shape or holder.dtype not in _FLOATS:
        return False
    if len(shape) == 2:
        return holder.shape[-1] == shape[-1] and 2 * prod(holder.shape) >= prod(shape)
    # a loss may flatten the samples, or what comes behind the classes
    is_side = holder.shape[0] == shape[0] or holder.shape[-1] == shape[-1]
    return is_side and prod(holder.shape) == prod(shape)


def _logits(
    like: list[PeakBlocks], log_softmax: Holder, lives: Lives | None
) -> Iterator[PeakBlocks]:
    """Yield what a loss was given, of all that has the shape of scores: features may have it, too.

    It is what was made last before the loss; without lives, it is known where there is only one.
    """
    made = [each for each in like if each.holder.op not in _OF_SCORES]
    if lives is None or log_softmax not in lives.holders:
        if sum(each.count for each in made) == 1 and len(log_softmax.shape) == 2:
            yield from made
        return
    in_order = [lives.holders[index] for index in lives.holder]
    for holder in reversed(in_order[: in_order.index(log_softmax)]):
        if holder.op not in _OF_SCORES and _is_like(holder, log_softmax.shape):
            yield from (each for each in made if each.holder == holder)
            return


def _classes(shape: tuple[int, ...], scores: list[PeakBlocks]) -> int | None:
    """Return the number of classes; None where the records do not show which dimension has them."""
    if len(shape) <= 2:
        return shape[-1]
    for holder in (each.holder for each in scores):
        if holder.op.startswith("nll_loss2d"):
            return holder.shape[1]
        if holder.op.startswith("nll_loss"):
            return holder.shape[-1]
    return None


def _masks(blocks: list[PeakBlocks], plan: PlanRecord) -> _Found:
    """Find masks of attention, queries by keys, that are not kept small by broadcasting."""
    holders = [each.holder for each in plan.peak_blocks]
    if plan.lives is not None:
        holders += plan.lives.holders
    attentions = [each for each in dict.fromkeys(holders) if _ATTENTION.search(each.op)]
    masks = [
        each
        for each in blocks
        if _may_be_mask(each.holder) and any(_masked(each.holder, one) for one in attentions)
    ]
    if not masks:
        return None, []
    total = _total(masks)
    saving = Saving(
        kind="mask",
        size_bytes=total,
        modules=_modules(masks),
        text=(
            f"attention masks that are expanded to {_shape(masks[0].holder)} hold "
            f"{format_bytes(total)} at the peak{_in(masks)}: a mask that is broadcast, or "
            "is_causal=True in scaled_dot_product_attention, may take their place"
        ),
        brief="expanded attention masks: try to broadcast one, or is_causal=True",
    )
    return saving, masks


def _may_be_mask(holder: Holder) -> bool:
    """Whether a tensor has the form of a mask, one for each sample or head; images may have it."""
    shape = holder.shape
    if len(shape) < 3 or shape[-1] != shape[-2] or holder.op not in _MASKING:
        return False
    # scores of attention have the shape of a mask for every head, and are no mask
    return holder.dtype == "bool" or (len(shape) == 4 and shape[1] == 1)


def _masked(mask: Holder, attention: Holder) -> bool:
    """Whether attention of these shapes runs where what may be a mask was made, or below it."""
    parent = mask.module.rpartition(".")[0]
    if not _is_in(attention.module, (mask.module, parent)):
        return False
    shape, batch, length = attention.shape, mask.shape[0], mask.shape[-1]
    if len(shape) < 3 or batch not in (shape[0], prod(shape[:-2])):
        return False
    if "scaled_dot_product" in attention.op:
        return shape[-2] == length
    # with one head, float scores that were scaled cannot be told from a mask
    has_heads = mask.dtype == "bool" or prod(shape[:-2]) > batch
    return has_heads and shape[-2:] == (length, length)


def _upcasts(blocks: list[PeakBlocks], plan: PlanRecord) -> _Found:
    """Find float32 copies, where the run computes in half precision."""
    is_half = plan.model.autocast or any(
        each.holder.category == "parameters" and each.holder.dtype in _HALF
        for each in plan.peak_blocks
    )
    copies = [
        each
        for each in blocks
        if each.holder.op == "_to_copy"
        and each.holder.dtype == "float32"
        and each.holder.phase == "forward"
    ]
    if not is_half or not copies:
        return None, []
    total = _total(copies)
    # what is in no module may be a loss's, for which there is no such kernel
    is_in_modules = all(_modules(copies))
    fused = (
        "a fused kernel in the place of several ops (as F.gelu is of its formula) or "
        if is_in_modules
        else ""
    )
    saving = Saving(
        kind="upcast",
        size_bytes=total // 2,
        modules=_modules(copies),
        text=(
            f"copies in float32 hold {format_bytes(total)} at the peak of a run in half "
            f"precision{_in(copies)}: where the code casts by itself, or calls pow, exp or a loss "
            f"under autocast, {fused}staying in half precision may do without"
        ),
        brief="copies in float32: try "
        + ("fused kernels, or " if is_in_modules else "")
        + "to stay in half precision",
    )
    return saving, copies


def _frozen(blocks: list[PeakBlocks], plan: PlanRecord) -> _Found:
    """Find activations that modules keep of which no parameter learns.

    Where nothing before them learns, autograd keeps none of theirs, and no_grad() frees nothing.
    """
    if plan.lives is None:
        return None, []
    kept = [each for root in plan.model.frozen for each in _inside(root, plan.lives, blocks)]
    if not kept:
        return None, []
    total = _total(kept)
    saving = Saving(
        kind="frozen",
        size_bytes=total,
        modules=_modules(kept),
        text=(
            f"modules of which no parameter learns keep {format_bytes(total)} of activations "
            f"at the peak{_in(kept)}, because gradients pass through them: checkpoints around "
            "them may free these"
        ),
        brief="what frozen modules keep for gradients that pass through: try checkpoints",
    )
    return saving, kept


def _inside(root: str, lives: Lives, blocks: list[PeakBlocks]) -> Iterator[PeakBlocks]:
    """Yield what a frozen module keeps that checkpoints around it would free.

    That is nothing where no gradient passes through it, or where checkpoints are on already, and
    never what it made last, its result, which stays for those who take it.
    """
    own = [holder for holder in lives.holders if _is_in(holder.module, (root,))]
    backward = {holder.category for holder in own if holder.phase == "backward"}
    if "temporaries" not in backward or "activations" in backward:
        return
    made = [
        lives.holders[index]
        for index in lives.holder  # in ascending order of their allocation
        if lives.holders[index] in own and lives.holders[index].phase == "forward"
    ]
    for each in blocks:
        holder = each.holder
        is_kept = holder.category == "activations" and holder.phase == "forward"
        # casts of weights are kept, too, and are no activations
        if is_kept and holder.op != "_to_copy" and holder in made and holder != made[-1]:
            yield each


def _is_in(module: str, roots: Iterable[str]) -> bool:
    """Whether a module is one of these or inside of one; all are inside the model itself, ""."""
    return any(not root or module == root or module.startswith(root + ".") for root in roots)


def _total(blocks: Iterable[PeakBlocks]) -> int:
    return sum(each.size_bytes for each in blocks)


def _modules(blocks: Iterable[PeakBlocks]) -> tuple[str, ...]:
    totals: dict[str, int] = {}
    for each in blocks:
        name = each.holder.module
        totals[name] = totals.get(name, 0) + each.size_bytes
    most: Callable[[str], int] = totals.__getitem__
    return tuple(sorted(totals, key=most, reverse=True))


def _in(blocks: list[PeakBlocks]) -> str:
    """Say in which modules blocks are, and on which line of the user's."""
    named = [name for name in _modules(blocks) if name]
    more = f" and {len(named) - 1:,} more" if len(named) > 1 else ""
    line = next((each.holder.where for each in blocks if each.holder.where), "")
    said = f"in {named[0]}{more}" if named else ""
    return "".join(f" ({part})" for part in (", ".join(filter(None, (said, line))),) if part)


def _shape(holder: Holder) -> str:
    return " x ".join(f"{size:,}" for size in holder.shape)
