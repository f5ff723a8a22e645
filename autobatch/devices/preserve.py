"""Nothing of the process is changed by a run: random states, torch's switches, the collector's.

Invariant: on the way out, by whatever door, every state listed here is as it was on the way in.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

import torch

from autobatch.support.randomness import random_state_kept

__all__ = ["process_state_preserved"]

_SWITCHES = (
    (torch.backends.cudnn, ("enabled", "benchmark", "deterministic")),
    # `allow_tf32` stands for both of these, and cannot be read where they differ
    (torch.backends.cudnn.conv, ("fp32_precision",)),  # type: ignore[attr-defined]
    (torch.backends.cudnn.rnn, ("fp32_precision",)),
)


@contextlib.contextmanager
def process_state_preserved() -> Iterator[None]:
    """Put back random states, torch's switches and the collector's; collect where we say."""
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    gradients, dtype = torch.is_grad_enabled(), torch.get_default_dtype()
    switches = [(of, name, getattr(of, name)) for of, names in _SWITCHES for name in names]
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
        for of, name, setting in switches:
            if getattr(of, name) != setting:
                setattr(of, name, setting)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        if cuda_states:
            torch.cuda.set_rng_state_all(cuda_states)
