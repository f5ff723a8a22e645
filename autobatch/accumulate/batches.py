"""A loader's batches, recut into the micro-batches of training windows.

Invariant: every sample of the loader is given out once, in its order, whatever sizes the loader's
batches have; a batch that fits as it is is passed on untouched.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from autobatch.accumulate.reused import Reuse
from autobatch.errors import AutobatchWarning, SampleError
from autobatch.workload.layout import Layout
from autobatch.workload.sample import BatchDims, Rows, rows_of
from autobatch.workload.sequences import sequences_of
from autobatch.workload.tree import is_array, leaves

__all__ = ["Count", "Cut", "Piece", "Pieces", "Position", "Reader", "handed"]

Count = Callable[[Any], int]
Cut = Callable[[Any, int, int], Any]


class Position(NamedTuple):
    """How far a loader has been read: batches used up, and samples used of the next one."""

    batches: int = 0
    samples: int = 0


@dataclass(slots=True)  # one for each micro-batch: frozen ones take three times as long to make
class Piece:
    """Some samples of a loader's batch, in the loader's own structure.

    Attributes:
        batch: what the model gets.
        samples: how many samples it holds.
        cut: `cut(start, stop)` gives a part of them; None where this batch cannot be cut.
    """

    batch: Any
    samples: int
    cut: Callable[[int, int], Any] | None

    def part(self, start: int, stop: int) -> Piece:
        """Return samples `start` to `stop` as a piece of its own.

        Raises:
            SampleError: the batch cannot be cut.
        """
        if (start, stop) == (0, self.samples):
            return self
        if self.cut is None:
            raise SampleError(
                f"a batch of {self.samples} samples has to be cut at {stop}, and only its size is "
                "known: pass cut=lambda batch, start, stop: … with count="
            )
        cut = self.cut
        return Piece(cut(start, stop), stop - start, lambda a, b: cut(start + a, start + b))

    def halves(self) -> tuple[Piece, Piece]:
        """Return the larger half and the smaller one."""
        middle = (self.samples + 1) // 2
        return self.part(0, middle), self.part(middle, self.samples)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """How many samples a batch has, and how to cut it.

    Attributes:
        batch_dims: where the batch dimension is not the first, as in `autobatch.batch_builder`.
        count: `count(batch)` gives the number of samples where its tensors do not tell.
        cut: `cut(batch, start, stop)` gives some of its samples, together with `count`.
    """

    batch_dims: BatchDims = None
    count: Count | None = None
    cut: Cut | None = None
    _last: list[tuple[Any, Layout]] = field(default_factory=list)
    _like: list[Layout] = field(default_factory=list)

    def __call__(self, batch: Any) -> Piece | None:
        """Read one batch of the loader; None where a collate function left nothing of it.

        Raises:
            SampleError: its number of samples is unknown or not positive.
        """
        if self.count is None and self._last and type(batch) is Tensor:
            shapes, layout = self._last[0]
            if batch.shape == shapes:  # as most are
                return Piece(batch, layout.size, partial(_cut, batch, layout))
        if _is_empty(batch):
            return None
        if self.count is None:
            layout = self._layout(batch)
            return Piece(batch, layout.size, partial(_cut, batch, layout))
        samples = int(self.count(batch))
        if samples < 1:
            raise SampleError(f"count(batch) gives {samples}: a batch has at least 1 sample")
        own = self.cut
        return Piece(batch, samples, own and (lambda start, stop: own(batch, start, stop)))

    def _layout(self, batch: Any) -> Layout:
        """Read the layout of a batch, or take that of the last one, which had the same shapes."""
        shapes = _shapes(batch)
        if self._last and shapes is not None and self._last[0][0] == shapes:
            return self._last[0][1]
        layout = self._as_before(batch)
        if layout is None:
            like = self._like[0] if self._like else None
            layout = rows_of(batch, batch_dims=self.batch_dims, like=like).layout
        self._like[:] = [layout]
        if layout.is_made_of_rows:
            self._last[:] = [(shapes if layout.is_told_by_shapes else None, layout)]
        return layout

    def _as_before(self, batch: Any) -> Layout | None:
        """Read a batch as the last one, if it has the same tensors; None where that fits not.

        A last batch of one sample could be read in more ways than those before it.
        """
        if not self._last:
            return None
        known = self._last[0][1]
        found = {path: leaf for path, leaf in leaves(batch, stop=known.stop) if is_array(leaf)}
        sizes = {path: leaf.shape[known.dim(path)] for path, leaf in found.items()
                 if path in known.roles and leaf.ndim > known.dim(path)}  # fmt: skip
        others = {path for path, leaf in found.items() if leaf.ndim and path not in known.roles}
        if len(set(sizes.values())) != 1 or sizes.keys() != known.roles.keys():
            return None
        if others - known.rest - known.whole:
            return None
        size = next(iter(sizes.values()))
        if not size:
            return None
        sequences = sequences_of(batch, size, stop=lambda *_: False, like=known)
        return replace(known, size=size, sequences=sequences)


def _cut(batch: Any, layout: Layout, start: int, stop: int) -> Any:
    return Rows(batch, layout).cut(start, stop)


def _shapes(batch: Any) -> Any:
    """Return the shapes of a tensor, or a tuple, list or dict of tensors; None of other batches."""
    kind = type(batch)
    if kind is Tensor:
        return batch.shape
    if kind is dict:
        if set(map(type, batch.values())) == _TENSORS:
            return [(name, tensor.shape) for name, tensor in batch.items()]
    elif kind in (tuple, list) and set(map(type, batch)) == _TENSORS:
        return [kind, *(tensor.shape for tensor in batch)]
    return None


_TENSORS = {Tensor}


def _is_empty(batch: Any) -> bool:
    """Whether a batch has no samples at all: None, a container of nothing, tensors of no rows."""
    if type(batch) is Tensor:
        return not (batch.dim() and len(batch))
    if batch is None:
        return True
    found = [leaf for _, leaf in leaves(batch)]
    rows = [leaf for leaf in found if is_array(leaf) and leaf.ndim]
    if rows:
        return not any(map(len, rows))
    return all(isinstance(leaf, (list, tuple, dict)) and not leaf for leaf in found)


def handed(batch: Any) -> tuple[Any, list[Tensor]]:
    """Return a batch in containers of its own, and its tensors, which are not copied.

    What a loss function takes out of a dictionary, or puts there, is then not missing, or there,
    where the same micro-batch runs again.

    >>> import torch
    >>> given = {"x": torch.ones(2), "names": ["a", "b"]}
    >>> own, (x,) = handed(given)
    >>> own["names"].clear(), own.pop("x") is x, list(given), given["names"]
    (None, True, ['x', 'names'], ['a', 'b'])
    """
    kind = type(batch)
    if kind is Tensor:
        return batch, [batch]
    if kind is dict and set(map(type, batch.values())) == _TENSORS:
        return dict(batch), list(batch.values())
    if kind in (tuple, list) and set(map(type, batch)) == _TENSORS:
        return kind(batch), list(batch)
    found: list[Tensor] = []
    shared: dict[int, Any] = {}
    for _, leaf in leaves(batch):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        if type(leaf) not in (list, dict, set):
            shared[id(leaf)] = leaf
    try:
        return copy.deepcopy(batch, shared), found
    except Exception:  # an object of the user's that cannot be copied
        return batch, found


class Pieces:
    """The loader's samples in pieces of at most a given size.

    Attributes:
        position: where the next piece begins.
    """

    def __init__(
        self, loader: Iterable[Any], reader: Reader, position: Position, reuse: Reuse
    ) -> None:
        self._batches: Iterator[Any] = iter(loader)
        self._reader = reader
        self._reuse = reuse
        self._current: Piece | None = None
        self._drawn = 0  # batches in the window that is drawn
        self._waiting: list[tuple[Piece, Piece, int, int]] = []  # whole, part, start, stop
        self.position = position
        for read in range(position.batches):
            if next(self._batches, self) is self:
                raise SampleError(
                    f"the loader ends after {read} batches, and the saved state had read "
                    f"{position.batches}: resume with the loader that it was saved with"
                )

    def take(self, most: int) -> Piece | None:
        """Return the next piece, of at most `most` samples; None at the loader's end.

        Raises:
            SampleError: a batch cannot be read or cut.
        """
        if self._current is None:
            self._keep()
            batch = next(self._batches, self)
            if batch is self:
                return None
            whole = self._reader(batch)
            if whole is None:
                self.position = Position(self.position.batches + 1)
                return self.take(most)
            self._current = whole
            self._drawn += 1
        current, start = self._current, self.position.samples
        stop = min(current.samples, start + most)
        piece = current.part(start, stop)
        self._waiting.append((current, piece, start, stop))
        if stop == current.samples:
            self._current = None
            self.position = Position(self.position.batches + 1)
        else:
            self.position = Position(self.position.batches, stop)
        return piece

    def _keep(self) -> None:
        """Copy what waits in the window, where the loader may write to it for its next batch."""
        if not self._waiting or not self._reuse.must_copy(self._drawn):
            return
        given: Piece | None = None
        own: Piece | None = None  # the same batch in memory of its own
        for whole, piece, start, stop in self._waiting:
            if whole is not given:
                given, batch = whole, self._reuse.copied(whole.batch)
                own = None if batch is whole.batch else self._reader(batch)
            if own is not None:
                part = own.part(start, stop)
                piece.batch, piece.cut = part.batch, part.cut
        self._waiting.clear()

    def window(self, sizes: tuple[int, ...]) -> list[Piece]:
        """Return pieces of as many samples as `sizes` sum to, or fewer at the end of the loader.

        A batch of the loader that is as large as the window is cut into exactly these sizes. A
        batch no larger than a micro-batch stays one piece. Other batches are cut where needed.
        """
        self._reuse.begin_window()
        self._waiting.clear()
        self._drawn = int(self._current is not None)
        drawn: list[Piece] = []
        left = sum(sizes)
        was_cut = False
        while left:
            planned = sizes[len(drawn)] if len(drawn) < len(sizes) else max(sizes)
            piece = self.take(min(planned, left))
            if piece is None:
                break
            drawn.append(piece)
            left -= piece.samples
            was_cut |= self._current is not None
        last = self._waiting[-1][0].batch if self._waiting else None
        self._reuse.end_window(self._drawn, last)
        self._waiting.clear()
        if was_cut and len(drawn) > len(sizes):
            warnings.warn(
                f"the loader's batches do not divide into micro-batches of {max(sizes)}, or not a "
                f"window of {sum(sizes)} samples: they are cut, which is exact, but smaller "
                f"micro-batches are slower; use batch_size={max(sizes)}",
                AutobatchWarning,
                stacklevel=2,
            )
        return drawn
