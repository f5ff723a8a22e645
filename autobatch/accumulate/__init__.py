"""Gradient accumulation in the user's own loop: the gradient of the effective batch, exactly.

for window in plan.windows(loader, optimizer):
    for batch in window:
        window.backward(loss_fn(model, batch))
    window.step()
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from autobatch.accumulate.ranks import group_of
from autobatch.accumulate.window import Window, Windows
from autobatch.errors import UsageError
from autobatch.support.ranks import ranks_here

if TYPE_CHECKING:
    from autobatch.records.plan_record import PlanRecord

__all__ = ["Window", "Windows", "planned_windows", "windows"]


def windows(
    loader: Iterable[Any],
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
    *,
    micro_batch: int,
    accumulation_steps: int,
    **options: Any,
) -> Windows:
    """Return the training windows of a loader from plain numbers; `Plan.windows` from a plan.

    The loader may yield micro-batches, whole effective batches or batches of any other size: each
    window takes exactly micro_batch × accumulation_steps samples on this rank, and the last one
    what is left. The window's gradient is that of the mean over its samples on all ranks. A
    window's micro-batches are drawn before the first of them runs, so that their weights are known:
    let a loader with workers prefetch as many.

    Args:
        loader: an iterable of batches; any structure that `autobatch.batch_builder` reads.
        optimizer: one, or several that are stepped together.
        micro_batch: samples in one forward/backward.
        accumulation_steps: micro-batches between two updates.
        **options:
            model: the module that DistributedDataParallel or fully_shard gave; needed where
                several ranks train together.
            scheduler: one or several learning-rate schedulers, stepped once a window.
            clip_norm: 2-norm that gradients are clipped to (after unscaling), or None.
            scaler: a `torch.amp.GradScaler`; losses are scaled and gradients unscaled with it.
            weight: `weight(batch)` is what the batch's loss is a mean over, such as its number of
                tokens with a label; the default is its number of samples. Micro-batches that weigh
                nothing are left out.
            reduction: "mean", or "sum" where the loss is a sum over what `weight` counts.
            batch_dims: as in `autobatch.batch_builder`.
            count, cut: `count(batch)` and `cut(batch, start, stop)` for batches of other kinds.
            drop_last: leave out a last window with fewer samples.
            group: ranks with different samples; the default is DDP's own, or all.
            sync: when FSDP2 reduces gradients: in the "last" micro-batch, which keeps whole
                gradients on every rank meanwhile, or in "each". DDP averages in the last.
            retries: how many times `Window.run` goes on after a lack of memory in one window.
            guard_update: keep a copy of what the optimizer changes, in host memory, during each
                update, so that it can be taken back in the middle.

    Raises:
        UsageError: a number is not positive, or several ranks train a model that is not given or
            averages no gradients.

    >>> import torch
    >>> model = torch.nn.Linear(3, 1)
    >>> loader = torch.utils.data.DataLoader(torch.ones(10, 3), batch_size=4)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> for window in windows(loader, optimizer, micro_batch=2, accumulation_steps=4):
    ...     for batch in window:
    ...         window.backward(model(batch).square().mean())
    ...     window.step()
    ...     print(window.samples, window.micro_batches)
    8 (2, 2, 2, 2)
    2 (2,)
    """
    if isinstance(accumulation_steps, bool) or not isinstance(accumulation_steps, int):
        raise UsageError(f"accumulation_steps is {accumulation_steps!r}: give a whole number")
    return Windows(loader, optimizer, sizes=(micro_batch,) * accumulation_steps, **options)


def planned_windows(
    plan: PlanRecord,
    loader: Iterable[Any],
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
    **options: Any,
) -> Windows:
    """Return this rank's windows of a plan; see `Plan.windows`.

    Raises:
        UsageError: the plan is for another number of ranks, or as from `windows`.
    """
    group = group_of(options.get("model"), options.get("group"))
    ranks = ranks_here(group)
    if ranks != plan.world_size:
        raise UsageError(
            f"the plan is for {plan.world_size} GPUs and {ranks} train here, which would make the "
            f"effective batch {plan.effective_batch * ranks // plan.world_size} instead of "
            f"{plan.target}: plan with world_size={ranks}"
        )
    defaults: dict[str, Any] = {
        "clip_norm": plan.model.clip_norm,
        "sync": "each" if plan.sharding in ("fsdp", "custom") else None,
    }
    rank = dist.get_rank(group) if ranks > 1 else 0
    return Windows(loader, optimizer, sizes=plan.split.windows[rank], **(defaults | options))
