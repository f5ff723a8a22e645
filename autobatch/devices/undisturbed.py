"""Nothing of the process is changed by a run: random states, torch's switches, the collector's.

Invariant: on the way out, by whatever door, every state listed here is as it was on the way in.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

import torch

from autobatch.randomness import random_state_kept

__all__ = ["undisturbed"]

_CUDNN_FLAGS = ("enabled", "benchmark", "deterministic", "allow_tf32")


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Put back random states, torch's switches and the collector's; collect where we say."""
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    gradients, dtype = torch.is_grad_enabled(), torch.get_default_dtype()
    flags = {name: getattr(torch.backends.cudnn, name) for name in _CUDNN_FLAGS}
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    collecting = gc.isenabled()
    frozen_by_user = gc.get_freeze_count()
    gc.disable()
    gc.freeze()  # what is alive now is no garbage of ours; leaving it out makes collecting fast
    try:
        with random_state_kept():
            yield
    finally:
        if not frozen_by_user:
            gc.unfreeze()
        if collecting:
            gc.enable()
        torch.set_grad_enabled(gradients)
        torch.set_default_dtype(dtype)
        for name, flag in flags.items():
            setattr(torch.backends.cudnn, name, flag)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        if cuda_states:
            torch.cuda.set_rng_state_all(cuda_states)
