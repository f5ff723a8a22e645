"""Optimizers whose state grows for many steps: L-BFGS keeps pairs of vectors until it has enough.

Invariant: only an optimizer without any history gets one, and its class steps on with it.
"""

from __future__ import annotations

from typing import Any

import torch

from autobatch.workload.optimizers import parameters_of

__all__ = ["with_full_history"]


def with_full_history(optimizer: Any) -> None:
    """Give L-BFGS the state that it has after many steps, in which its history is full.

    >>> optimizer = torch.optim.LBFGS([torch.ones(3, requires_grad=True)], history_size=2)
    >>> with_full_history(optimizer)
    >>> [len(state["old_dirs"]) for state in optimizer.state.values()]
    [2]
    """
    if not isinstance(optimizer, torch.optim.LBFGS) or optimizer.state:
        return
    parameters = list(parameters_of([optimizer]))
    first, size = parameters[0], sum(p.numel() for p in parameters)
    group = optimizer.param_groups[0]

    def vector() -> torch.Tensor:
        return torch.ones(size, dtype=first.dtype, device=first.device)

    def pairs() -> list[torch.Tensor]:
        return [vector() for _ in range(group["history_size"])]

    optimizer.state[first].update(
        func_evals=1,
        n_iter=1,
        d=vector(),
        t=group["lr"],
        old_dirs=pairs(),
        old_stps=pairs(),
        ro=[vector()[0].clone() for _ in range(group["history_size"])],
        H_diag=vector()[0].clone(),
        prev_flat_grad=vector(),
        prev_loss=1.0,
    )
