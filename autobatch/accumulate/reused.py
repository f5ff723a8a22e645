"""Loaders that fill the same memory anew for each batch, as those with buffers of their own do.

Invariant: a micro-batch holds what the loader gave, though its window draws others after it.

A loop by hand is done with a batch when it asks for the next one; a window draws all of its batches
before the first one runs. So the first window runs on copies, and shows whether the loader wrote to
what it had given; if so, all windows do. A thread that fills buffers ahead may write later, which
is why batches in host memory are compared again when their window has run. Windows of more batches
than were ever looked at count as first ones.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from autobatch.accumulate.watch import versions
from autobatch.workload.tree import Path, is_array, leaves

__all__ = ["Reuse"]


class Reuse:
    """Learns whether a loader writes to batches that it gave, and copies them where it may.

    Args:
        loader: the iterable of batches.
    """

    def __init__(self, loader: Iterable[Any]) -> None:
        self._is_fresh = _makes_fresh_batches(loader)
        self._reuses = False
        self._looked_at = 1  # batches of the largest window that was
        self._unsure = 0  # windows whose batches shared memory that held the same all along
        self._pairs: list[tuple[Any, Any]] = []  # batches as the loader has them, and copies

    def begin_window(self) -> None:
        """Compare the batches of the last window once more, before the loader is asked again."""
        if self._pairs:
            self._compare()
            self._pairs.clear()

    def must_copy(self, drawn: int) -> bool:
        """Whether the batches that wait have to be copied before another one is drawn.

        Args:
            drawn: batches of the window by now.
        """
        return not self._is_fresh and (self._reuses or drawn >= self._looked_at)

    def copied(self, batch: Any) -> Any:
        """Return a copy of a batch that waits; the batch itself where it has none."""
        own = _copy(batch)
        if own is not batch and not self._reuses:
            self._pairs.append((batch, own))
        return own

    def end_window(self, drawn: int, last: Any) -> None:
        """Compare what was copied with what the loader has made of it, when all is drawn.

        Args:
            drawn: batches of the window.
            last: the last of them.
        """
        if not self._pairs:
            return
        self._compare()
        starts: Counter[tuple[Path, int]] = Counter()
        for batch in (*(given for given, _ in self._pairs), last):
            starts.update(_starts(batch))
        is_shared = max(starts.values(), default=0) > 1
        self._unsure += is_shared
        if not is_shared or self._unsure >= _UNSURE:
            self._looked_at = max(self._looked_at, drawn)
        # those on a GPU would take memory that the passes need
        self._pairs = [pair for pair in self._pairs if _is_on_host(pair[0])]

    def _compare(self) -> None:
        self._reuses = self._reuses or not all(_is_same(*pair) for pair in self._pairs)


_UNSURE = 3
"""Windows after which memory that all batches share counts as constant, such as a mask."""


def _makes_fresh_batches(loader: Any) -> bool:
    """Whether every batch has memory of its own for certain, so that no window needs copies."""
    if type(loader) in (list, tuple):
        return True
    if type(loader) is not DataLoader:
        return False
    stacks = loader.collate_fn is default_collate and loader.batch_sampler is not None
    return stacks or loader.num_workers > 0


def _copy(batch: Any) -> Any:
    """Return a batch in containers of its own, with copies of its tensors.

    Tensors that take gradients stay, as those are looked for in them.
    """
    memo: dict[int, Any] = {}
    for _, leaf in leaves(batch):
        if is_array(leaf):
            memo[id(leaf)] = _copied(leaf)
        elif type(leaf) not in (list, dict, set):
            memo[id(leaf)] = leaf
    try:
        return copy.deepcopy(batch, memo)
    except Exception:  # an object of the user's that cannot be copied
        return batch


def _copied(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return copy.copy(leaf)
    if leaf.requires_grad:
        return leaf
    try:
        with torch.inference_mode(leaf.is_inference()), torch.no_grad():
            own = leaf.clone()
        own.__dict__.update(leaf.__dict__)  # attributes that a collate function gave it
        return own
    except Exception:  # a kind of tensor that has no copy
        return leaf


def _is_same(given: Any, own: Any) -> bool:
    """Whether a batch holds what its copy does, as far as that can be told."""
    there, kept = list(leaves(given)), list(leaves(own))
    if [path for path, _ in there] != [path for path, _ in kept]:
        return False
    return all(_is_alike(a, b) for (_, a), (_, b) in zip(there, kept, strict=True))


def _is_alike(given: Any, own: Any) -> bool:
    if given is own:
        return True
    try:
        if not isinstance(own, Tensor):
            return bool((given == own).all()) if is_array(own) else bool(given == own)
        if versions([own]) != [0]:  # the user's loop wrote to it
            return True
        if (given.shape, given.dtype) != (own.shape, own.dtype):
            return False
        return bool(((given == own) | ((given != given) & (own != own))).all())
    except Exception:  # values that do not compare
        return True


def _starts(batch: Any) -> list[tuple[Path, int]]:
    """Return where the memory of a batch's arrays begins."""
    return [
        (path, leaf.data_ptr() if isinstance(leaf, Tensor) else leaf.__array_interface__["data"][0])
        for path, leaf in leaves(batch)
        if is_array(leaf) and _has_memory(leaf)
    ]


def _has_memory(leaf: Any) -> bool:
    if not isinstance(leaf, Tensor):
        return True
    return type(leaf) is Tensor and leaf.layout is torch.strided and leaf.numel() > 0


def _is_on_host(batch: Any) -> bool:
    return all(leaf.device.type == "cpu" for _, leaf in leaves(batch) if isinstance(leaf, Tensor))
