"""FSDP2 applied to a copied model: block by block, or by the user's own function."""

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

__all__ = ["shard"]


def shard(model: nn.Module, workload: Workload, policy: Any) -> list[str]:
    """Apply FSDP2 to a module in place, as rank 0 of the process group; return notes for the user.

    Args:
        model: the copied module, whole, on the device.
        workload: says whether the user gave a function that shards.
        policy: the copy of that function.

    Raises:
        UsageError: the function applied `fully_shard` to nothing.
    """
    from torch.distributed.fsdp import FSDPModule, fully_shard

    notes = []
    with _real_meshes():
        if workload.shares == "custom":
            policy(model)
        else:
            blocks = repeated_blocks(model)
            for module in (*blocks, model):
                fully_shard(module)
            if not blocks:
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


@contextlib.contextmanager
def _real_meshes() -> Iterator[None]:
    """Build device meshes with real tensors, and parameter groups with fake ones.

    FSDP2 reads the values of a mesh's tensors, and copies parameters when it makes a group.
    """
    group_class = fsdp2().group_class
    make = group_class.__init__

    def made(group: Any, *args: Any, **kwargs: Any) -> None:
        with mode:
            make(group, *args, **kwargs)

    with unset_fake_temporarily() as found, patched(group_class, __init__=made):
        mode: Any = found
        yield
