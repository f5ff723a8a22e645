"""A copied model shared out over ranks: block by block, or by the user's own function."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from autobatch.errors import UsageError
from autobatch.support.patching import patched
from autobatch.support.torch_private import fsdp2, unset_fake_temporarily
from autobatch.workload.blocks import repeated_blocks
from autobatch.workload.workload import AUTOCAST_DTYPES, Workload

__all__ = ["shard"]


def shard(
    model: nn.Module, workload: Workload, policy: Any, afterwards: contextlib.ExitStack
) -> tuple[nn.Module, list[str]]:
    """Share a module out as rank 0 of the process group; return what runs, and notes for the user.

    FSDP2 and tensor parallel plans change the module in place. FSDP1 wraps it, so that a function
    has to return the wrapper.

    Args:
        model: the copied module, whole, on the device.
        workload: says whether the user gave a function that shards.
        policy: the copy of that function.
        afterwards: what is to be done when the run has ended.

    Raises:
        UsageError: the function shared nothing out.
    """
    from torch.distributed.fsdp import fully_shard

    notes = []
    runs = model
    with _real_meshes():
        if workload.shares == "custom":
            whole = list(model.parameters())
            made = policy(model)
            runs = made if isinstance(made, nn.Module) else model
            _free(whole, runs)
            afterwards.callback(_let_go, runs)
        else:
            blocks = repeated_blocks(model)
            for module in (*blocks, model):
                fully_shard(module)
            if not blocks:
                notes.append(
                    f"{type(model).__name__} has no repeated blocks: FSDP2 gathers all of its "
                    "parameters at once; pass a function as sharding to shard its parts"
                )
    if not _is_shared_out(runs):
        raise UsageError(
            "the function given as sharding applied fully_shard to no module of the model, nor a "
            "tensor parallel plan, and returned no FullyShardedDataParallel: call "
            "torch.distributed.fsdp.fully_shard on its blocks, then on the model itself"
        )
    if workload.autocast is not None:
        notes.append(
            f"autocast keeps {workload.autocast} copies of all weights that FSDP2 gathers, whole, "
            "while forward runs, and without checkpointing until backward: "
            "fully_shard(…, mp_policy=MixedPrecisionPolicy(param_dtype="
            f"{AUTOCAST_DTYPES[workload.autocast]})) in a function given as sharding, without "
            "autocast, keeps none"
        )
    return runs, notes


def _free(whole: list[nn.Parameter], runs: nn.Module) -> None:
    """Free the parameters that FSDP1 copied into flat ones; the copier still knows them."""
    kept = set(map(id, runs.parameters()))
    for parameter in whole:
        if id(parameter) not in kept:
            parameter.data = parameter.data.new_empty(0)


def _let_go(runs: nn.Module) -> None:
    """Take the views of flat parameters from FSDP1's modules: both keep one another alive."""
    for parameter in runs.parameters():
        if getattr(parameter, "_is_flat_param", False):
            infos: Any = parameter
            for info in infos._param_infos:
                vars(info.module).pop(info.param_name, None)


def _is_shared_out(model: nn.Module) -> bool:
    """Whether a module is sharded by FSDP1 or FSDP2, or has parameters that are parts of others."""
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

    kinds = (FSDPModule, FullyShardedDataParallel)
    if any(isinstance(module, kinds) for module in model.modules()):
        return True
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


@contextlib.contextmanager
def _real_meshes() -> Iterator[None]:
    """Build device meshes with real tensors, and groups of parameters with fake ones.

    FSDP2 reads the values of a mesh's tensors, and copies parameters when it makes a group; FSDP1
    makes flat parameters. DTensor copies a generator's state to the device.
    """
    from torch.distributed.fsdp import FullyShardedDataParallel

    def faked(make: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(make)
        def made(*args: Any, **kwargs: Any) -> Any:
            with mode:
                return make(*args, **kwargs)

        return made

    private = fsdp2()
    group_class: Any = private.group_class
    tracker: Any = private.random.OffsetBasedRNGTracker
    flat_class: Any = FullyShardedDataParallel
    with (
        unset_fake_temporarily() as found,
        patched(group_class, __init__=faked(group_class.__init__)),
        patched(flat_class, __init__=faked(flat_class.__init__)),
        patched(tracker, _get_device_state=faked(tracker._get_device_state)),
    ):
        mode: Any = found
        yield
