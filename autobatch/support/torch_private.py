"""The private parts of PyTorch that the simulation needs, and nothing else knows how to reach.

Private names come and go with PyTorch's releases. Each is imported here, once, under a name of its
own, and everything else imports it from here. Modules and classes on which names are replaced for
the length of a run are handed out as they are; that the names are there is checked here.

Invariant: no other module of the package names a private part of PyTorch. The import of one that
the installed PyTorch lacks is a `UsageError` that names it.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from autobatch.errors import UsageError
from autobatch.support.patching import environment_kept

__all__ = [
    "DISPATCHING_MODULES",
    "FOREACH_MODULES",
    "NEWEST_TORCH",
    "OLDEST_TORCH",
    "PRIVATE_USE_1",
    "SUPPORTED_NODES",
    "VF",
    "BatchNorm",
    "CheckpointWrapper",
    "DataDependentOutputException",
    "DeviceGuard",
    "DisableTorchFunction",
    "DispatchKeySet",
    "DynamicOutputShapeException",
    "ExcludeDispatchKeyGuard",
    "FakeTensor",
    "FakeTensorMode",
    "Fsdp2",
    "NormBase",
    "OpOverload",
    "OpOverloadPacket",
    "PrivateUse1Hooks",
    "ProfiledEvent",
    "SpectralParametrization",
    "TorchDispatchMode",
    "UnsupportedOperatorException",
    "attention_priorities",
    "check_reduced",
    "clear_cublas_workspaces",
    "cudnn_bindings",
    "current_autograd_node",
    "current_graph_task_id",
    "current_transform_level",
    "detect_fake_mode",
    "drop_unreduced",
    "fake_tensor",
    "found_infinite",
    "fsdp2",
    "is_made_of_ops",
    "is_memory_history_on",
    "look_up_functions_of_torch",
    "memory_snapshot",
    "next_sequence_number",
    "no_dispatch",
    "op_implementations_checks",
    "parse_dispatch_key",
    "preload_fake_tensors",
    "private_use_1_name",
    "record_memory_history",
    "register_private_use_1",
    "replicated_count",
    "run_backward",
    "set_attention_priorities",
    "shard_groups",
    "storage_use_count",
    "subclasses",
    "torch_version",
    "tree_leaves",
    "tree_map",
    "tree_unflatten",
    "unset_fake_temporarily",
    "without_hooks",
]

OLDEST_TORCH, NEWEST_TORCH = "2.10", "2.15"
"""CI runs the tests on the oldest, which `pyproject.toml` asks for; reports used the newest."""


@contextlib.contextmanager
def _known(part: str = "") -> Iterator[None]:
    """Turn a private name that is missing into an error that says which versions have it."""
    try:
        yield
    except (ImportError, AttributeError) as error:
        what = str(error).partition(" (")[0]  # without the path of a file
        raise UsageError(
            f"{part}torch {torch.__version__} is built in a way that is not known here ({what}): "
            f"use torch {OLDEST_TORCH} to {NEWEST_TORCH}, or a newer autobatch"
        ) from error


def _require(owner: Any, *names: str) -> None:
    """Look up names that are replaced, or called, on their owner."""
    for name in names:
        getattr(owner, name)


with _known():
    import torch._subclasses as subclasses
    from torch import _VF as VF
    from torch._C import DisableTorchFunction, DispatchKeySet
    from torch._C import _current_autograd_node as current_autograd_node
    from torch._C import _current_graph_task_id as current_graph_task_id
    from torch._C import _ExcludeDispatchKeyGuard as ExcludeDispatchKeyGuard
    from torch._C import _get_privateuse1_backend_name as private_use_1_name
    from torch._C import _get_sdp_priority_order as attention_priorities
    from torch._C import _parse_dispatch_key as parse_dispatch_key
    from torch._C import _set_sdp_priority_order as set_attention_priorities
    from torch._C import _storage_Use_Count as storage_use_count
    from torch._C._acc import DeviceGuard, PrivateUse1Hooks
    from torch._C._autograd import DeviceType
    from torch._C._autograd import _get_sequence_nr as next_sequence_number
    from torch._C._functorch import maybe_current_level as current_transform_level
    from torch._C._profiler import _EventType as ProfiledEvent
    from torch._guards import detect_fake_mode
    from torch._ops import OpOverload, OpOverloadPacket
    from torch._subclasses import fake_tensor
    from torch._subclasses.fake_impls import op_implementations_checks
    from torch._subclasses.fake_tensor import (
        DataDependentOutputException,
        DynamicOutputShapeException,
        FakeTensor,
        FakeTensorMode,
        UnsupportedOperatorException,
        unset_fake_temporarily,
    )
    from torch.autograd.graph import _engine_run_backward as run_backward
    from torch.cuda.memory import _record_memory_history as record_memory_history
    from torch.cuda.memory import _snapshot as memory_snapshot
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
    from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
    from torch.nn.modules.batchnorm import _NormBase as NormBase
    from torch.nn.utils.parametrizations import _SpectralNorm as SpectralParametrization
    from torch.utils._mode_utils import no_dispatch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import SUPPORTED_NODES, tree_leaves, tree_map, tree_unflatten
    from torch.utils.backend_registration import (
        _setup_privateuseone_for_python_backend as register_private_use_1,
    )

    PRIVATE_USE_1: Any = DeviceType.PrivateUse1
    # torch.optim hides its own submodule
    DISPATCHING_MODULES = ("torch.overrides", "torch._tensor", "torch._ops", "torch.utils._device")
    FOREACH_MODULES = tuple(
        map(importlib.import_module, ("torch.optim.optimizer", "torch.utils._foreach_utils"))
    )
    for _module in FOREACH_MODULES:
        _require(_module, "_foreach_supported_types")
    _require(fake_tensor, "CONSTANT_NUMEL_LIMIT", "run_fallback_kernel")
    _require(torch.autograd, "_engine_run_backward")
    _require(VF, "_pack_padded_sequence", "_pad_packed_sequence")
    if torch.backends.cuda.is_built():
        _require(torch._C, "_cuda_clearCublasWorkspaces", "_cuda_isHistoryEnabled")


def preload_fake_tensors() -> None:
    """Import what FakeTensorMode would import in the middle of the first answer: two seconds.

    The import of Dynamo sets TORCHINDUCTOR_CACHE_DIR; what compiles later sets it by itself.
    """
    with _known(), environment_kept():
        import torch._dynamo.config
        import torch._functorch.config
        import torch.fx.experimental.symbolic_shapes
        import torch.nested._internal.nested_tensor  # noqa: F401


def look_up_functions_of_torch() -> None:
    """Let Dynamo look up the functions of PyTorch, unless it has.

    It keeps the table that it makes when it is first asked, or is asked again after a process group
    began. Made where functions stand in for PyTorch's, it would know these, and for ever.
    """
    with _known():
        from torch._dynamo import trace_rules

        trace_rules.get_torch_obj_rule_map()


def torch_version() -> tuple[int, ...]:
    """Return the major and the minor number of PyTorch's version."""
    return tuple(map(int, torch.__version__.split(".")[:2]))


def cudnn_bindings() -> Any:
    """Return PyTorch's bindings of cuDNN, or None in a build without it.

    They need no driver; `torch.backends.cudnn` asks for the GPU's.
    """
    return getattr(torch._C, "_cudnn", None)


def clear_cublas_workspaces() -> None:
    """Free the workspaces that cuBLAS keeps; for CUDA builds."""
    torch._C._cuda_clearCublasWorkspaces()


def is_made_of_ops(op: OpOverload) -> bool:
    """Whether an op is a composite one, which has no kernel of its own and calls other ops."""
    try:
        return op.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)
    except RuntimeError:  # an overload of TorchScript's alone, which is not dispatched
        return False


def is_memory_history_on() -> bool:
    """Whether the CUDA allocator records its events; for CUDA builds."""
    return bool(torch._C._cuda_isHistoryEnabled())


def check_reduced(model: Any) -> None:
    """Check that DistributedDataParallel has averaged everything that its last pass prepared.

    Raises:
        RuntimeError: it waits for gradients that did not come.
    """
    with _known("DistributedDataParallel of "):
        check = model._check_reducer_finalized
    check()


def has_begun_learning(model: Any) -> bool:
    """Whether a backward pass from which DistributedDataParallel learns its graph has begun."""
    with _known("DistributedDataParallel of "):
        return bool(model._static_graph_delay_allreduce_enqueued)


def finish_learning(model: Any) -> None:
    """Do what DistributedDataParallel does at the end of that pass, where this was cut short.

    It averages all gradients there.
    """
    with _known("DistributedDataParallel of "):
        average = model.reducer._delay_all_reduce
    average()


def rebuild_buckets(model: Any) -> None:
    """Let DistributedDataParallel put gradients into buckets in the order in which they came.

    It does so once, on all ranks together, in the first forward pass after its first average.
    """
    with _known("DistributedDataParallel of "):
        rebuild = model.reducer._rebuild_buckets
        if rebuild():
            model._has_rebuilt_buckets = True


def replicated_count(model: Any) -> int:
    """Return of how many parameters DistributedDataParallel averages the gradients."""
    with _known("DistributedDataParallel of "):
        return int(model._get_ddp_logging_data()["num_parameter_tensors"])


@contextlib.contextmanager
def without_hooks(parameters: list[Any]) -> Iterator[None]:
    """Let backward passes run without the hooks of Python's that parameters have."""
    names = ("_backward_hooks", "_post_accumulate_grad_hooks")
    kept = [(p, name, getattr(p, name)) for p in parameters for name in names]
    try:
        for parameter, name, _ in kept:
            setattr(parameter, name, None)
        yield
    finally:
        for parameter, name, hooks in kept:
            setattr(parameter, name, hooks)


def shard_groups(module: Any) -> list[Any]:
    """Return the groups of parameters that an FSDP2 module gathers and reduces together.

    They have `gradient_divide_factor`.
    """
    with _known("FSDP2 of "):
        state = module._get_fsdp_state()
        groups = getattr(state, "_fsdp_param_groups", None)
        found = [state._fsdp_param_group] if groups is None else groups
        return [group for group in found if group is not None]


def drop_unreduced(group: Any) -> None:
    """Drop the gradients of a group that were not reduced, outside of its parameters' `.grad`."""
    with _known("FSDP2 of "):
        for parameter in group.fsdp_params:
            parameter.unsharded_accumulated_grad = None
            if hasattr(parameter, "_unsharded_param"):  # it was gathered before
                parameter._unsharded_param.grad = None


def found_infinite(scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer) -> bool:
    """Whether unscaling an optimizer's gradients found one that is not finite; waits for it.

    Raises:
        UsageError: this PyTorch's scaler keeps that elsewhere.
    """
    with _known("GradScaler of "):
        found = scaler._found_inf_per_device(optimizer)
    return any(bool(flag.item()) for flag in found.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Fsdp2:
    """The private parts of FSDP2, DTensor and checkpointing, on which names are replaced.

    Attributes:
        param_group: the module that runs the collectives.
        collectives: its functions that do, by name.
        group_class: holds the parameters that are gathered together.
        fully_shard: the module of `fully_shard`, which makes the default mesh.
        default_mesh: the name there of the function that makes it.
        propagator: infers the shapes of DTensors.
        random: the module of DTensor's random numbers, which holds their tracker.
        checkpoint: the module of activation checkpointing.
        saved_checks: the name there of what tells of a tensor what is compared when it is
            computed again; by the names that users know.
        flat_parameters: the module of FSDP1's flat parameters.
        set_global_rank: tells C++ the rank that its messages begin with; -1 for none.
    """

    param_group: ModuleType
    collectives: Mapping[str, Callable[..., Any]]
    group_class: Any
    fully_shard: ModuleType
    default_mesh: str
    propagator: Any
    random: Any
    checkpoint: ModuleType
    saved_checks: str
    flat_parameters: Any
    set_global_rank: Callable[[int], None]


def fsdp2() -> Fsdp2:
    """Import what a simulated rank needs, the process group `fake` included.

    Raises:
        UsageError: a name that is replaced for the length of a run is not there.
    """
    with _known("FSDP2 of "):
        import torch.testing._internal.distributed.fake_pg
        import torch.utils.checkpoint
        from torch.distributed.fsdp import _flat_param
        from torch.distributed.fsdp._fully_shard import _fsdp_param_group, _fully_shard
        from torch.distributed.tensor import _random
        from torch.distributed.tensor._sharding_prop import ShardingPropagator

        default_mesh = "_init_default_mesh"
        if torch.__version__.startswith("2.10."):  # it was renamed in torch 2.11
            default_mesh = "_init_default_fully_shard_mesh"
            # gives collectives the shape rules that torch 2.11 has built in
            import torch.distributed._tools.fake_collectives
        collectives = ("foreach_all_gather", "foreach_all_gather_copy_out", "foreach_reduce")
        _require(_fully_shard, default_mesh)
        _require(_fsdp_param_group, "record_function")
        _require(_flat_param, "_same_storage")
        _require(ShardingPropagator, "_propagate_tensor_meta_non_cached")
        saved_checks = "_allowed_determinism_checks_to_fns"
        _require(torch.utils.checkpoint, saved_checks)
        _require(_random, "_rng_tracker")
        _require(_random._RNGStateTracker, "distribute_region_enabled")
        _require(_random.OffsetBasedRNGTracker, "_get_device_state")
        return Fsdp2(
            param_group=_fsdp_param_group,
            collectives={name: getattr(_fsdp_param_group, name) for name in collectives},
            group_class=_fsdp_param_group.FSDPParamGroup,
            fully_shard=_fully_shard,
            default_mesh=default_mesh,
            propagator=ShardingPropagator,
            random=_random,
            checkpoint=torch.utils.checkpoint,
            saved_checks=saved_checks,
            flat_parameters=_flat_param,
            # not every build prefixes its messages
            set_global_rank=getattr(
                torch._C._distributed_c10d, "_set_global_rank", lambda rank: None
            ),
        )
