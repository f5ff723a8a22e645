"""The random numbers of a run, recorded so that a run on some of its samples gets the same ones.

Invariant: a draw is given again only where its shape says which rows belong to the samples; any
other draw is counted as unmatched, never guessed.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

__all__ = ["Draw", "Draws", "Span", "other_random_state", "put_back", "rows_of"]

Span = tuple[int, int]
"""Start and end of some samples."""


@dataclass(frozen=True, slots=True)
class Draw:
    """One draw of PyTorch's.

    Attributes:
        op: name of the op that drew.
        value: what was drawn.
        parameters: the tensors that the distribution was made from, such as probabilities.
    """

    op: str
    value: Tensor
    parameters: tuple[Tensor, ...]


@dataclass(slots=True)
class Draws:
    """The draws of a run on a whole batch.

    Attributes:
        samples: of the batch.
        made: the draws, in their order.
        others: the state of Python's and NumPy's random numbers after the forward pass.
    """

    samples: int
    made: list[Draw] = field(default_factory=list)
    others: tuple[Any, ...] = ()


def rows_of(recorded: Tensor, shape: Sequence[int], span: Span, samples: int) -> Tensor | None:
    """Return the rows of a recorded tensor that some of the samples need.

    Args:
        recorded: of the whole batch.
        shape: what the run on these samples asks for.
        span: the samples.
        samples: of the whole batch.

    Returns:
        All of it where the shapes are the same; None where they do not tell which rows are meant.

    >>> import torch
    >>> rows_of(torch.arange(6), (2,), (1, 2), 3)
    tensor([2, 3])
    """
    if recorded.shape == tuple(shape):
        return recorded
    changed = [
        d for d in range(recorded.dim()) if list(recorded.shape)[d : d + 1] != [*shape[d : d + 1]]
    ]
    if recorded.dim() != len(shape) or len(changed) != 1:
        return None
    entries, rest = divmod(recorded.shape[changed[0]], samples)
    start, stop = span
    if rest or shape[changed[0]] != entries * (stop - start):
        return None
    return recorded.narrow(changed[0], start * entries, (stop - start) * entries)


def put_back(state: tuple[Any, ...]) -> None:
    """Set the state of Python's and NumPy's random numbers to one that was read before."""
    random.setstate(state[0])
    if len(state) > 1:
        sys.modules["numpy"].random.set_state(state[1])


def other_random_state() -> tuple[Any, ...]:
    """Return the state of Python's and NumPy's random numbers, to be compared."""
    numpy: Any = sys.modules.get("numpy")
    if numpy is None:
        return (random.getstate(),)
    name, keys, *rest = numpy.random.get_state()
    return random.getstate(), (name, tuple(keys.tolist()), *rest)
