"""What is held at the peak that training may do without: copies, masks, parts that do not learn.

Invariant: only what the records show is named, with its bytes; whether it can go is the user's to
say, so every sentence says "may".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Literal

from autobatch.records.holders import Holder, PeakBlocks
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Saving:
    """Memory that may not be needed.

    Attributes:
        kind: "scores" of classes held more than once, "upcast" copies of half-precision tensors,
            an expanded "mask", or activations of "frozen" modules.
        size_bytes: at the peak, of what may go; a tensor may be in savings of two kinds.
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
    found = (*_scores(blocks), *_upcasts(blocks, plan), *_masks(blocks), *_frozen(plan))
    least = _WORTH * plan.footprint.peak_allocated_bytes
    worth = [saving for saving in found if saving.size_bytes >= least]
    return tuple(sorted(worth, key=lambda saving: -saving.size_bytes))


def _scores(blocks: list[PeakBlocks]) -> Iterator[Saving]:
    """Find scores of classes, such as a language model's logits, that are alive more than once."""
    largest = max(
        (each for each in blocks if each.holder.op == "_log_softmax"),
        key=lambda each: each.size_bytes,
        default=None,
    )
    if largest is None:
        return
    shape = largest.holder.shape
    alike = [each for each in blocks if _is_like(each.holder, shape)]
    count = sum(each.count for each in alike)
    if count < 2:
        return
    total = sum(each.size_bytes for each in alike)
    least = min(each.size_bytes // each.count for each in alike)
    has_gradients = any(each.holder.phase == "backward" for each in alike)
    counted = ", gradients counted" if has_gradients else ""
    yield Saving(
        kind="scores",
        size_bytes=total - least,
        modules=_modules(alike),
        text=(
            f"scores of {shape[-1]:,} classes are held {count} times at the peak{counted}, "
            f"{format_bytes(total)} together{_in(alike)}: a loss that is computed in chunks may "
            "need only a part of it at once"
        ),
        brief=f"scores of {shape[-1]:,} classes are held {count} times: try a loss in chunks",
    )


def _is_like(holder: Holder, shape: tuple[int, ...]) -> bool:
    """Whether a tensor has as many classes, and about as many rows: labels may be shifted."""
    if not holder.shape or holder.shape[-1] != shape[-1] or holder.dtype not in _FLOATS:
        return False
    return 2 * prod(holder.shape) >= prod(shape)


_FLOATS = (*_HALF, "float32", "float64")


def _upcasts(blocks: list[PeakBlocks], plan: PlanRecord) -> Iterator[Saving]:
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
    if is_half and copies:
        total = _total(copies)
        yield Saving(
            kind="upcast",
            size_bytes=total // 2,
            modules=_modules(copies),
            text=(
                f"copies in float32 hold {format_bytes(total)} at the peak of a run in half "
                f"precision{_in(copies)}: where the model casts by itself, or calls pow, exp or "
                "tanh under autocast, a fused kernel (such as F.gelu) or staying in half precision "
                "may do without"
            ),
            brief="copies in float32: try fused kernels, or to stay in half precision",
        )


def _masks(blocks: list[PeakBlocks]) -> Iterator[Saving]:
    """Find masks of attention, queries by keys, that are not kept small by broadcasting."""
    masks = [each for each in blocks if _is_mask(each.holder)]
    if masks:
        total = _total(masks)
        yield Saving(
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


def _is_mask(holder: Holder) -> bool:
    shape = holder.shape
    if len(shape) < 3 or shape[-1] != shape[-2] or holder.op not in _MASKING:
        return False
    # scores of attention have the shape of a mask for every head, and are no mask
    return holder.dtype == "bool" or (len(shape) == 4 and shape[1] == 1)


def _frozen(plan: PlanRecord) -> Iterator[Saving]:
    """Find activations that modules keep of which no parameter learns."""
    frozen = plan.model.frozen
    kept = [
        each
        for each in plan.peak_blocks
        if each.holder.category == "activations" and _is_in(each.holder.module, frozen)
    ]
    if kept:
        total = _total(kept)
        yield Saving(
            kind="frozen",
            size_bytes=total,
            modules=_modules(kept),
            text=(
                f"modules of which no parameter learns keep {format_bytes(total)} of activations "
                f"at the peak{_in(kept)}: where nothing before them learns, torch.no_grad() around "
                "them may free these; elsewhere checkpoints may"
            ),
            brief="what frozen modules keep: try checkpoints, or no_grad() if none before learns",
        )


def _is_in(module: str, roots: Iterable[str]) -> bool:
    return any(module == root or module.startswith(root + ".") for root in roots)


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
