"""What a run must not change in the process: random states, torch's switches, the collector.

Invariant: on every exit, including exceptions, each of these is as it was before.
"""

from __future__ import annotations

import contextlib
import gc
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from autobatch.support.interrupts import arriving, uninterrupted
from autobatch.support.randomness import random_state_kept
from autobatch.support.torch_private import attention_priorities, set_attention_priorities

__all__ = [
    "answering",
    "attention_in_asked_order",
    "kernel_switches",
    "one_at_a_time",
    "process_state_preserved",
    "switches_kept",
]

_CUDNN = (
    (torch.backends.cudnn, ("enabled", "benchmark", "deterministic")),
    # `allow_tf32` combines these two, and cannot be read where they differ
    (torch.backends.cudnn.conv, ("fp32_precision",)),  # type: ignore[attr-defined]
    (torch.backends.cudnn.rnn, ("fp32_precision",)),
)

_matmul = torch.backends.cuda.matmul
_REDUCTIONS = ("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction")
_PRODUCTS = (
    (torch.backends, ("fp32_precision",)),  # what the others have that are not set themselves
    (torch.backends.mkldnn, ("fp32_precision",)),
    (_matmul, ("fp32_precision", *_REDUCTIONS)),
    (torch.backends.mkldnn.matmul, ("fp32_precision",)),  # type: ignore[attr-defined]
)

_FUNCTIONS: tuple[tuple[Callable[[], Any], Callable[[Any], Any]], ...] = (
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_num_threads, torch.set_num_threads),
    (lambda: _readable(torch.get_float32_matmul_precision), torch.set_float32_matmul_precision),
    *(
        (getattr(torch.backends.cuda, read), getattr(torch.backends.cuda, write))
        for kernel in ("flash", "mem_efficient", "math", "cudnn")
        for read, write in [(f"{kernel}_sdp_enabled", f"enable_{kernel}_sdp")]
    ),
)
"""What tells a switch, and what sets it; the precision of products before those it is made of."""

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
        "cudnn": [getattr(of, name) for of, names in _CUDNN for name in names],
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
def answering() -> Iterator[None]:
    """What every call of a user's runs in: no Ctrl-C is lost, and torch's switches are put back."""
    with switches_kept(), arriving():
        yield


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


def _readable(read: Callable[[], Any]) -> Any:
    """Read the precision of products; None where the user set it by its parts, which are kept."""
    try:
        return read()
    except RuntimeError:
        return None


def _deterministic() -> tuple[bool, bool]:
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    return torch.are_deterministic_algorithms_enabled(), warns


def _anomalies() -> tuple[bool, bool]:
    return torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()


@contextlib.contextmanager
def switches_kept() -> Iterator[None]:
    """Put back torch's switches, and NumPy's of errors, whatever the user's code makes of them.

    A function that builds a model may set them for its runs: they last until all of these ended.
    """
    attributes = [(of, name) for of, names in (*_PRODUCTS, *_CUDNN) for name in names]
    switches: list[tuple[Callable[[], Any], Callable[[Any], Any]]] = [
        *_FUNCTIONS,
        *((partial(getattr, of, name), partial(setattr, of, name)) for of, name in attributes),
    ]
    before = [read() for read, _ in switches]
    deterministic, anomalies = _deterministic(), _anomalies()
    numpy = sys.modules.get("numpy")
    errors = numpy.geterr() if numpy else {}
    try:
        yield
    finally:
        with uninterrupted(), one_at_a_time():
            for (read, write), setting in zip(switches, before, strict=True):
                if setting is not None and read() != setting:
                    write(setting)
            if _deterministic() != deterministic:  # setting it imports the compiler
                torch.use_deterministic_algorithms(deterministic[0], warn_only=deterministic[1])
            if _anomalies() != anomalies:
                torch.autograd.set_detect_anomaly(*anomalies)
            if numpy:
                numpy.seterr(**errors)


@contextlib.contextmanager
def _kept() -> Iterator[None]:
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    collecting = gc.isenabled()
    frozen_before = gc.get_freeze_count() > _PYTHONS_OWN_FROZEN
    try:
        with uninterrupted():
            gc.disable()
            # objects from before the run are none of its garbage; leaving them out saves time
            gc.freeze()
        with switches_kept(), random_state_kept():
            yield
    finally:
        with uninterrupted():
            if not frozen_before:
                gc.unfreeze()
            if collecting:
                gc.enable()
            if cuda_states:
                torch.cuda.set_rng_state_all(cuda_states)
