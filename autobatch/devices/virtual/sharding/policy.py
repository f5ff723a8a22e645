"""FSDP2 applied to a copied model, as the usual policy or the user's own says."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from autobatch.devices.virtual.sharding.blocks import repeated_blocks
from autobatch.errors import UsageError
from autobatch.support.patching import patched
from autobatch.support.torch_private import fsdp2, unset_fake_temporarily
from autobatch.workload.workload import Workload

__all__ = ["sharded"]


def sharded(model: nn.Module, workload: Workload, policy: Any) -> list[str]:
    """Apply FSDP2 to a module in place, as rank 0 of the process group, and return what to say.

    Args:
        model: the copied module, whole, on the device.
        workload: says whether a policy of the user's is to be applied.
        policy: the copied function, where it is.

    Raises:
        UsageError: the function applied `fully_shard` to nothing.
    """
    from torch.distributed.fsdp import FSDPModule

    notes = []
    with _meshes_can_be_made():
        if workload.shares == "custom":
            policy(model)
        elif not _shard_blocks(model):
            notes.append(
                f"{type(model).__name__} has no repeated blocks: FSDP2 gathers all of its "
                "parameters at once; pass a function as sharding to shard its parts"
            )
    if not any(isinstance(module, FSDPModule) for module in model.modules()):
        raise UsageError(
            "the function given as sharding applied fully_shard to no module of the model: call "
            "torch.distributed.fsdp.fully_shard on its blocks, then on the model itself"
        )
    if workload.autocast is not None:
        notes.append(
            f"autocast keeps {workload.autocast} copies of all weights that FSDP2 gathers, whole, "
            "while forward runs, and without checkpointing until backward: "
            "fully_shard(…, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16)) in a "
            "function given as sharding, without autocast, keeps none"
        )
    return notes


def _shard_blocks(model: nn.Module) -> bool:
    """Shard a model the usual way, and return whether it has blocks."""
    from torch.distributed.fsdp import fully_shard

    blocks = repeated_blocks(model)
    for block in blocks:
        fully_shard(block)
    fully_shard(model)
    return bool(blocks)


@contextlib.contextmanager
def _meshes_can_be_made() -> Iterator[None]:
    """Build device meshes with real tensors, whose values are read, and groups with fake ones."""
    group_class = fsdp2().group_class
    make = group_class.__init__

    def made(group: Any, *args: Any, **kwargs: Any) -> None:
        with mode:
            make(group, *args, **kwargs)

    with unset_fake_temporarily() as found, patched(group_class, __init__=made):
        mode: Any = found
        yield
