"""The random states of a process, left as they were found.

Invariant: after the block, torch's CPU generator, Python's and NumPy's give the numbers that they
would have given before it.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["random_state", "random_state_kept"]


def random_state() -> Callable[[], None]:
    """Return what puts the global generators back as they are now; NumPy's if it is loaded."""
    states: list[tuple[Callable[[Any], Any], Any]] = [
        (torch.set_rng_state, torch.get_rng_state()),
        (random.setstate, random.getstate()),
    ]
    if numpy := sys.modules.get("numpy"):
        states.append((numpy.random.set_state, numpy.random.get_state()))

    def put_back() -> None:
        for put, state in states:
            put(state)

    return put_back


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Put the global generators back at the end; NumPy's if it is loaded by now."""
    put_back = random_state()
    try:
        yield
    finally:
        put_back()
