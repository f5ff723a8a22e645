"""A loader's batches, recut into the micro-batches of training windows.

Invariant: every sample of the loader is given out once, in its order, whatever sizes the loader's
batches have; a batch that fits as it is is passed on untouched.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from autobatch.errors import AutobatchWarning, SampleError
from autobatch.workload.sample import BatchDims, rows_of

__all__ = ["Count", "Cut", "Piece", "Pieces", "Position", "Reader"]

Count = Callable[[Any], int]
Cut = Callable[[Any, int, int], Any]


class Position(NamedTuple):
    """How far a loader has been read: batches used up, and samples used of the next one."""

    batches: int = 0
    samples: int = 0


@dataclass(frozen=True, slots=True)
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

    def __call__(self, batch: Any) -> Piece:
        """Read one batch of the loader.

        Raises:
            SampleError: its number of samples is unknown or not positive.
        """
        if self.count is None:
            rows = rows_of(batch, batch_dims=self.batch_dims)
            return Piece(batch, rows.size, rows.cut)
        samples = int(self.count(batch))
        if samples < 1:
            raise SampleError(f"count(batch) gives {samples}: a batch has at least 1 sample")
        own = self.cut
        return Piece(batch, samples, own and (lambda start, stop: own(batch, start, stop)))


class Pieces:
    """The loader's samples in pieces of at most a given size.

    Attributes:
        position: where the next piece begins.
    """

    def __init__(self, loader: Iterable[Any], reader: Reader, position: Position) -> None:
        self._batches: Iterator[Any] = iter(loader)
        self._reader = reader
        self._current: Piece | None = None
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
            batch = next(self._batches, self)
            if batch is self:
                return None
            self._current = self._reader(batch)
        current, start = self._current, self.position.samples
        stop = min(current.samples, start + most)
        piece = current.part(start, stop)
        if stop == current.samples:
            self._current = None
            self.position = Position(self.position.batches + 1)
        else:
            self.position = Position(self.position.batches, stop)
        return piece

    def window(self, sizes: tuple[int, ...]) -> list[Piece]:
        """Return pieces of as many samples as `sizes` sum to, or fewer at the end of the loader.

        A batch of the loader that is as large as the window is cut into exactly these sizes. A
        batch no larger than a micro-batch stays one piece. Other batches are cut where needed.
        """
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
        if was_cut and len(drawn) > len(sizes):
            warnings.warn(
                f"the loader's batches do not divide into micro-batches of {max(sizes)}, or not a "
                f"window of {sum(sizes)} samples: they are cut, which is exact, but smaller "
                f"micro-batches are slower; use batch_size={max(sizes)}",
                AutobatchWarning,
                stacklevel=2,
            )
        return drawn
