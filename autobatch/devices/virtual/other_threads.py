"""Threads that the user's code starts, and in which it computes with simulated tensors."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from autobatch.errors import WorkloadError
from autobatch.support.patching import patched
from autobatch.support.torch_private import FakeTensor, FakeTensorMode, tree_leaves

__all__ = ["refused_in_other_threads"]


@contextlib.contextmanager
def refused_in_other_threads() -> Iterator[None]:
    """Refuse ops on simulated tensors that run in a thread in which nothing follows them.

    PyTorch's modes are those of a thread: elsewhere, tensors would be made that no allocator sees,
    on a device of their own. Autograd's threads take the modes along.

    Raises:
        WorkloadError: in the other thread, and at the end of the block if nobody passed that on.
    """
    here = threading.get_ident()
    original = vars(FakeTensor)["__torch_dispatch__"]
    refused: list[WorkloadError] = []

    def dispatch(cls: type, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # where a tensor is may not fail: C++ asks for that where no exception can pass
        is_followed = threading.get_ident() == here or func.namespace == "prim"
        if is_followed or not _is_simulated((args, kwargs)):
            return original.__get__(None, cls)(func, types, args, kwargs or {})
        refused.append(
            WorkloadError(
                f"the training run computes in a thread of its own ({func}), which is not "
                "simulated: let it run in the thread that calls the model, or tune on a GPU"
            )
        )
        raise refused[-1]

    with patched(FakeTensor, __torch_dispatch__=classmethod(dispatch)):
        yield
    if refused:
        raise refused[0]


def _is_simulated(values: Any) -> bool:
    """Return whether there is a tensor of a simulation; a thread may have fake ones of its own."""
    fakes = (leaf for leaf in tree_leaves(values) if isinstance(leaf, FakeTensor))
    return any(type(fake.fake_mode) is not FakeTensorMode for fake in fakes)
