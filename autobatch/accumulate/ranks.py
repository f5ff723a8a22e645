"""How the ranks of this process's training run work together."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch.distributed as dist
from torch import Tensor, nn

from autobatch.accumulate.agreement import Ranks
from autobatch.accumulate.replicas import Replicas, check_averaged
from autobatch.accumulate.shards import Shards
from autobatch.errors import UsageError
from autobatch.support.ranks import ranks_here
from autobatch.workload.wrappers import is_data_parallel

__all__ = ["Sync", "group_of", "ranks_of"]

Sync = Literal["last", "each"]


def group_of(model: nn.Module | None, group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """Return the ranks with different samples: those given, or DDP's own; None for all."""
    whole: Any = getattr(model, "_orig_mod", model)
    if group is None and whole is not None and is_data_parallel(whole):
        group = whole.process_group
    return group


def ranks_of(
    model: nn.Module | None,
    trained: Iterable[Tensor],
    *,
    group: dist.ProcessGroup | None = None,
    sync: Sync | None = None,
) -> Ranks:
    """Return how the ranks of this process's run work together.

    Args:
        model: as it is called in training, wrapped or sharded.
        trained: the parameters that optimizers hold.
        group: the ranks with different samples; None takes DDP's own, or all.
        sync: when FSDP2 reduces gradients; None is "last".

    Raises:
        UsageError: several ranks, and the model is unknown or does not average its gradients, or
            not those of all trained parameters.
    """
    group = group_of(model, group)
    ranks = ranks_here(group)
    if ranks == 1:
        return Ranks()
    if model is None:
        raise UsageError(
            f"{ranks} ranks train together: pass model=, the module that "
            "DistributedDataParallel or fully_shard gave, so that gradients are averaged once a "
            "window"
        )
    whole: Any = getattr(model, "_orig_mod", model)
    if is_data_parallel(whole):
        replicas = Replicas(whole, group)
        check_averaged(trained, model, averaged=replicas.averaged)
        return replicas
    sharded = _sharded_modules(whole)
    if sharded:
        check_averaged(trained, model, averaged=filter(_is_sharded, trained))
        return Shards(sharded, group, each=sync == "each")
    raise UsageError(
        f"{ranks} ranks train together, and {type(whole).__name__} averages no gradients: wrap it "
        "in DistributedDataParallel, or apply fully_shard to it"
    )


def _is_sharded(parameter: Tensor) -> bool:
    from torch.distributed.tensor import DTensor

    return isinstance(parameter, DTensor)


def _sharded_modules(model: nn.Module) -> list[Any]:
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]
