"""What a run must not change in the process: random states, torch's switches, the collector.

Invariant: on every exit, including exceptions, each of these is as it was before.
"""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

from autobatch.support.interrupts import uninterrupted
from autobatch.support.randomness import random_state_kept
from autobatch.support.torch_private import attention_priorities, set_attention_priorities

__all__ = [
    "attention_in_asked_order",
    "kernel_switches",
    "one_at_a_time",
    "process_state_preserved",
]

_SWITCHES = (
    (torch.backends.cudnn, ("enabled", "benchmark", "deterministic")),
    # `allow_tf32` combines these two, and cannot be read where they differ
    (torch.backends.cudnn.conv, ("fp32_precision",)),  # type: ignore[attr-defined]
    (torch.backends.cudnn.rnn, ("fp32_precision",)),
)

_USUAL_ORDER, _CUDNN_FIRST = [1, 2, 0, 3], [3, 1, 2, 0]
"""Flash, memory-efficient, math and cuDNN's kernel, as `torch.nn.attention.SDPBackend` has them."""

_PYTHONS_OWN_FROZEN = 1000
"""Python 3.12 starts with a few hundred frozen objects of its own: as many are not the user's."""

_turn = threading.RLock()

# of the machine: a simulated card takes their places in `torch.cuda` for a time
_is_cuda_initialized: Callable[[], bool] = torch.cuda.is_initialized
_real_capability: Callable[[], tuple[int, int]] = torch.cuda.get_device_capability


def kernel_switches() -> str:
    """Return those of torch's switches that decide which kernels run, as a line to compare.

    >>> "attention" in kernel_switches()
    True
    """
    cuda = torch.backends.cuda
    enabled = ("flash", "mem_efficient", "math", "cudnn")
    switches = {
        "attention": [getattr(cuda, f"{kernel}_sdp_enabled")() for kernel in enabled],
        "attention's order": _asked_order(),
        "cudnn": [getattr(of, name) for of, names in _SWITCHES for name in names],
        "deterministic": torch.get_deterministic_debug_mode(),
        "products": torch.backends.cuda.matmul.fp32_precision,
    }
    return str(switches)


def _asked_order() -> list[int]:
    """Return the order of attention's kernels that the user set, or PyTorch's before its first use.

    At its first use on a Hopper or Blackwell card of the machine, PyTorch puts cuDNN's kernel first
    where it keeps the user's order.
    """
    order = list(map(int, attention_priorities()))
    is_usual = (
        order[:4] == _CUDNN_FIRST and _is_cuda_initialized() and _real_capability()[0] in (9, 10)
    )
    return [*_USUAL_ORDER, *order[4:]] if is_usual else order


@contextlib.contextmanager
def attention_in_asked_order() -> Iterator[None]:
    """Let PyTorch's order of attention's kernels be the user's, not that of the machine's card."""
    before, asked = list(map(int, attention_priorities())), _asked_order()
    if asked == before:
        yield
        return
    set_attention_priorities(asked)
    try:
        yield
    finally:
        set_attention_priorities(before)


@contextlib.contextmanager
def process_state_preserved() -> Iterator[None]:
    """Put back what the block changes in the process, and let it collect garbage by itself.

    One thread at a time is in such a block: what one of them changes, another would take for the
    user's.
    """
    with one_at_a_time(), _kept():
        yield


def one_at_a_time() -> contextlib.AbstractContextManager[Any]:
    """Return the turn of a thread to change what belongs to the process, such as `torch.cuda`."""
    return _turn


@contextlib.contextmanager
def _kept() -> Iterator[None]:
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    gradients, dtype = torch.is_grad_enabled(), torch.get_default_dtype()
    switches = [(of, name, getattr(of, name)) for of, names in _SWITCHES for name in names]
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    collecting = gc.isenabled()
    frozen_before = gc.get_freeze_count() > _PYTHONS_OWN_FROZEN
    try:
        with uninterrupted():
            gc.disable()
            # objects from before the run are none of its garbage; leaving them out saves time
            gc.freeze()
        with random_state_kept():
            yield
    finally:
        with uninterrupted():
            if not frozen_before:
                gc.unfreeze()
            if collecting:
                gc.enable()
            torch.set_grad_enabled(gradients)
            torch.set_default_dtype(dtype)
            for of, name, setting in switches:
                if getattr(of, name) != setting:
                    setattr(of, name, setting)
            torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
            if cuda_states:
                torch.cuda.set_rng_state_all(cuda_states)
