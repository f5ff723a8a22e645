"""Out of GPU memory as a value.

Invariant: this is the only place that recognises it, and nothing is cleaned up while the error is
alive: its traceback owns the tensors of every frame that it passed.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch

__all__ = ["Shortage", "attempt", "let_go", "shortage_in"]

T = TypeVar("T")

LEGACY = (
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "CUSOLVER_STATUS_ALLOC_FAILED",
    "CUFFT_ALLOC_FAILED",
    "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed in a non-cont",
    "Unable to find a valid cuDNN algorithm to run convolution",
    "unable to find an engine to execute this computation",
)
"""What libraries say in a plain RuntimeError; cuDNN finds no engine whose workspace fits."""


class Shortage(str):
    """What could not be allocated, in one line."""


def attempt(work: Callable[[], T]) -> T | Shortage:
    """Return what `work` returns, or the shortage of GPU memory that ended it.

    When this returns, the error and everything that its traceback held are gone.
    """
    try:
        return work()
    except Exception as error:
        found = shortage_in(error)
        if found is None:
            raise
        let_go(error)
    return found


def shortage_in(error: BaseException) -> Shortage | None:
    """Return the shortage of GPU memory behind an error, or None where it is another error."""
    for link in _chain(error):
        message = " ".join(str(link).split())
        if isinstance(link, torch.OutOfMemoryError) or (
            isinstance(link, RuntimeError) and any(known in message for known in LEGACY)
        ):
            return Shortage(message.partition(". GPU ")[0][:200])
    return None


def let_go(error: BaseException) -> None:
    """Drop the local variables of an error's finished frames; its traceback still prints."""
    for link in _chain(error):
        traceback.clear_frames(link.__traceback__)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
