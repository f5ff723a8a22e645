"""Chooses the windows to compare with their batches, and the samples in them.

Invariant: where other windows or samples are compared than were asked for, a note says so.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from autobatch.equivalence.gradients import is_continuous
from autobatch.equivalence.module_calls import changed_values
from autobatch.equivalence.subject import Subject
from autobatch.support.wording import count
from autobatch.workload.sample import Rows, named_tensors
from autobatch.workload.tree import map_tensors

__all__ = ["ComparedWindows", "changed_rows", "choose_windows"]

_STEPS = 4
"""The most micro-batches of a plan to compare: from the second on, all run alike."""

_LARGE = 1_000_000
"""Parameters, or values in 16 samples, from which on five samples are compared."""


@dataclass(frozen=True, slots=True)
class ComparedWindows:
    """Windows, each as the sizes of its micro-batches with its samples, and notes for the user."""

    windows: tuple[tuple[tuple[int, ...], Rows], ...]
    notes: tuple[str, ...]
    is_large: bool


def choose_windows(subject: Subject, asked: tuple[int, ...], limit: int | None) -> ComparedWindows:
    """Return the window that was asked for, or a smaller one, and a window of unequal sizes.

    Args:
        subject: builds the batch.
        asked: sizes of the micro-batches of a window.
        limit: the most samples to compare; all that were asked for if None.

    Raises:
        SampleError: the batch cannot be cut.
    """
    notes: list[str] = []
    window = asked if len(asked) > 1 else (-(-asked[0] // 2), max(asked[0] // 2, 1))
    if len(asked) == 1:
        notes.append(f"the plan runs {asked[0]:,} samples at once: two halves were compared")
    if limit is not None and sum(window) > limit:
        steps = min(len(window), _STEPS, max(limit // 2, 2))
        window = (max(min(limit // steps, *window), 1),) * steps
        notes.append(
            f"{len(asked)} micro-batches of up to {max(asked):,} are planned: {steps} of "
            f"{window[0]} were compared, which no answer depends on but the size of a difference"
        )
    windows = [window] if len(set(window)) > 1 else [window, _unequal(window[0])]
    is_large = _is_large(subject)
    if is_large and sum(window) > sum(_unequal(min(max(window), 3))):
        windows = [_unequal(min(max(window), 3))]
        notes.append(
            f"the model is large: {' + '.join(map(str, windows[0]))} samples were compared in "
            f"place of {' + '.join(map(str, window))}, and nothing is found by equal sizes alone"
        )
    rows = subject.batch(max(map(sum, windows)))
    different = _different(rows)
    if different < rows.size:
        rows = changed_rows(rows, [(different, rows.size)])
        notes.append(
            f"the sample has {count(different, 'different row')}, and {rows.size} were compared: "
            "where rows repeat, numbers that are not integers were varied"
        )
    return ComparedWindows(
        tuple((each, rows.first(sum(each))) for each in windows), tuple(notes), is_large
    )


def _is_large(subject: Subject) -> bool:
    """Say whether all samples of a window would take more time than the answer is worth."""
    entries = sum(t.numel() for t in named_tensors(subject.batch(2).batch).values()) // 2
    parameters = sum(p.numel() for p in subject.workload.model.parameters())
    return parameters > _LARGE or 16 * entries > _LARGE


def _unequal(size: int) -> tuple[int, int]:
    """Return two different sizes, of at least 2 where possible: BatchNorm refuses one sample."""
    if size == 1:
        return 2, 1
    return (size, size - 1) if size > 2 else (3, 2)


def _different(rows: Rows) -> int:
    """Count the rows that differ from one another."""

    def content(index: int) -> tuple[bytes, ...]:
        tensors = named_tensors(rows.cut(index, index + 1)).values()
        return tuple(t.contiguous().view(torch.uint8).numpy().tobytes() for t in tensors if t.dim())

    return len({content(index) for index in range(rows.size)})


def changed_rows(rows: Rows, spans: Iterable[tuple[int, int]]) -> Rows:
    """Return a copy of the rows in which some samples have other floating-point values.

    Args:
        rows: to copy.
        spans: start and end of the samples to change.
    """
    changed = replace(rows, batch=map_tensors(Tensor.clone, rows.batch))
    for start, stop in spans:
        for part in named_tensors(changed.cut(start, stop)).values():  # views
            if is_continuous(part):
                part.copy_(changed_values(part))
    return changed
