"""A device type for simulated GPUs, and user code that says "cuda" landing on it.

Where the process has a live CUDA device, fake tensors on `cuda` need no backend and nothing is
registered; what `torch.cuda` tells is of the simulated card there, too. Elsewhere PyTorch's
PrivateUse1 slot is claimed once, under the name `virtual_gpu`; outside of a simulation it reports
itself as unavailable.

Invariant: nothing is registered in a user's process that has a real accelerator. Registration
would make the virtual device the current accelerator of that process, for as long as it lives.
"""

from __future__ import annotations

import contextlib
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from autobatch.devices.one_card import require_card
from autobatch.devices.virtual import autocast
from autobatch.devices.virtual.cuda_types import CudaGenerator, legacy_types
from autobatch.devices.virtual.device_guard import VirtualDeviceGuard
from autobatch.devices.virtual.kernels import outputs
from autobatch.devices.virtual.kernels.unknown_ops import run_on_cpu
from autobatch.devices.virtual.other_threads import refused_in_other_threads
from autobatch.devices.virtual.questions import Properties, note_question
from autobatch.errors import AutobatchError, WorkloadError
from autobatch.gpus.catalogue import GpuSpec
from autobatch.support import process
from autobatch.support.patching import patched
from autobatch.support.torch_private import (
    FOREACH_MODULES,
    FakeTensor,
    PrivateUse1Hooks,
    fake_tensor,
    look_up_functions_of_torch,
    private_use_1_name,
    register_private_use_1,
    subclasses,
)

__all__ = ["Inert", "built_for", "emulated_cuda", "virtual_device"]

_NAME = "virtual_gpu"
_MULTIPROCESSORS = 100
_CACHE_BYTES = 40 * 2**20
_active = False


class Inert:
    """Stands for streams, events and their contexts: there is one stream, and nothing to wait for.

    Any method may be called; it does nothing.
    """

    cuda_stream = 0
    device = torch.device("cuda", 0)

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def query(self) -> bool:
        """Return that all work is done."""
        return True

    def elapsed_time(self, other: Any) -> float:
        """Return 0.0 milliseconds: nothing was computed."""
        return 0.0

    def record_event(self, event: Any = None) -> Any:
        """Return an event."""
        return event or Inert()

    def __enter__(self) -> Inert:
        return self

    def __exit__(self, *args: object) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # Python asks for these where they are optional
            raise AttributeError(name)
        return _do_nothing


def _do_nothing(*args: Any, **kwargs: Any) -> None:
    pass


_STREAMS: dict[str, Any] = {
    **dict.fromkeys(("current_stream", "default_stream"), lambda device=None: Inert()),
    **dict.fromkeys(("Stream", "ExternalStream", "Event", "stream", "StreamContext"), Inert),
}
"""What modules of devices have for streams, by name."""


_NESTED = ("nested_tensor", "as_nested_tensor", "nested_tensor_from_jagged")


def _refuse_nested(*args: Any, **kwargs: Any) -> Any:
    raise WorkloadError(
        "nested tensors (torch.nested) cannot be simulated: pad the sequences for the probe, or "
        "tune on a GPU"
    )


class _Hooks(PrivateUse1Hooks):
    def is_available(self) -> bool:
        return _active

    def has_primary_context(self, device_index: int) -> bool:
        return True

    def is_built(self) -> bool:
        return True


class _NoTensor:
    """Stands for the class of fake tensors where code outside of PyTorch looks for it."""


def virtual_device() -> torch.device:
    """Return the device that simulated tensors live on, registering it on first use.

    Raises:
        AutobatchError: another accelerator, or another PrivateUse1 backend, is live here.
    """
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    slot = private_use_1_name()
    if slot == _NAME:
        return torch.device(_NAME, 0)
    live = torch.accelerator.current_accelerator(check_available=True)
    if slot != "privateuseone" or (live is not None and not process.is_ours()):
        raise AutobatchError(
            f"this process has the accelerator {live or slot}, which a simulation would take the "
            "place of: use the command line, `autobatch probe your_file.py:function --gpu NAME`"
        )
    register_private_use_1(
        rename=_NAME,
        backend_module=_device_module(),
        hook=_Hooks(),
        device_guard=VirtualDeviceGuard(),
    )
    autocast.register(_NAME)
    outputs.register()
    return torch.device(_NAME, 0)


def _device_module() -> ModuleType:
    """Return what PyTorch finds as `torch.virtual_gpu`."""
    module = ModuleType(f"torch.{_NAME}")

    def of_cuda(name: str) -> Any:
        """Return what `torch.cuda`, whose functions are replaced in a run, has of a name."""
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(torch.cuda, name)

    vars(module).update(
        __getattr__=of_cuda,
        _initialized=False,
        _is_in_bad_fork=lambda: False,
        is_initialized=lambda: False,
        is_available=lambda: _active,
        device_count=lambda: int(_active),
        current_device=lambda: 0,
        device=Inert,
        get_amp_supported_dtype=lambda: [torch.bfloat16, torch.float16, torch.float32],
        set_device=_do_nothing,
        synchronize=_do_nothing,
        empty_cache=_do_nothing,
        manual_seed_all=_do_nothing,
        **_STREAMS,
    )
    return module


@contextlib.contextmanager
def emulated_cuda(spec: GpuSpec, device: torch.device) -> Iterator[None]:
    """Let PyTorch's own Python code, and the user's, take the virtual device for a CUDA GPU."""
    global _active
    look_up_functions_of_torch()
    with contextlib.ExitStack() as patches:
        # placeholders need not lie in the support of a distribution
        patches.enter_context(patched(torch.distributions.Distribution, _validate_args=False))
        patches.enter_context(patched(nn.Module, _apply=_apply_to_fakes))
        # libraries that ask leave out of a traced run what a real one does
        patches.enter_context(patched(subclasses, FakeTensor=_NoTensor))
        patches.enter_context(patched(torch.nested, **dict.fromkeys(_NESTED, _refuse_nested)))
        patches.enter_context(
            # FakeTensorMode would follow constants, as `known_values.py` does
            patched(fake_tensor, CONSTANT_NUMEL_LIMIT=-1, run_fallback_kernel=run_on_cpu)
        )
        for module in FOREACH_MODULES:
            types = [*module._foreach_supported_types, FakeTensor]
            patches.enter_context(patched(module, _foreach_supported_types=types))
        patches.enter_context(refused_in_other_threads())
        patches.enter_context(_says_cuda(spec, device))
        if device.type == _NAME:
            patches.enter_context(autocast.follows_cuda(_NAME))
            _active = True
        try:
            yield
        finally:
            _active = False


@contextlib.contextmanager
def built_for(spec: GpuSpec) -> Iterator[None]:
    """Let code that builds a model find a CUDA card; what it puts there is on the CPU.

    Where there is a CUDA device, what it puts there is on it, and the card is described as `spec`.
    """
    if torch.cuda.is_available():
        with patched(torch.cuda, **_had(torch.cuda, _description(spec))):
            yield
        return
    host = torch.device("cpu")
    with _says_cuda(spec, host), CudaOnHost():
        yield


class CudaOnHost(TorchFunctionMode):
    """Puts on the CPU what code makes on, or moves to, a CUDA device."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Run a call, on the CPU where it says "cuda"."""
        if func is Tensor.cuda:
            require_card(args[1] if len(args) > 1 else (kwargs or {}).get("device"))
            return args[0]
        if func is torch.device:
            return func(*args, **(kwargs or {}))
        named = {name: _on_host(value) for name, value in (kwargs or {}).items()}
        return func(*map(_on_host, args), **named)


def _on_host(value: Any) -> Any:
    is_cuda = (isinstance(value, str) and value.startswith("cuda")) or (
        isinstance(value, torch.device) and value.type == "cuda"
    )
    if not is_cuda:
        return value
    require_card(value)
    return torch.device("cpu")


@contextlib.contextmanager
def _says_cuda(spec: GpuSpec, device: torch.device) -> Iterator[None]:
    """Replace what tells of, and makes objects for, CUDA cards; tensors land on `device`."""
    answers = {
        **_emulation(),
        **_description(spec),
        "current_device": lambda: device.index or 0,
        "set_device": lambda place: require_card(place, device.index or 0),
    }
    if device.type == _NAME:  # a simulated rank has put streams of its own into its module
        module = torch.get_device_module(device)
        answers.update({name: getattr(module, name) for name in _STREAMS})
    accelerator = {
        **answers,
        "current_accelerator": lambda check_available=False: torch.device("cuda"),
        "device_index": Inert,
        "get_memory_info": answers["mem_get_info"],
    }
    del accelerator["get_device_capability"]  # tells of dtypes there
    for name in ("index", "idx"):
        accelerator[f"current_device_{name}"] = answers["current_device"]
        accelerator[f"set_device_{name}"] = answers["set_device"]
    with (
        _told_here(torch.cuda, {**answers, **legacy_types(device)}),
        _told_here(torch.cuda.memory, answers),
        _told_here(torch.accelerator, accelerator),
        _told_here(torch, {"Generator": CudaGenerator}),
    ):
        yield


def _told_here(module: ModuleType, answers: dict[str, Any]) -> AbstractContextManager[None]:
    """Replace names of a module, but for threads that run already: they may use a real card."""
    others = frozenset(thread.ident for thread in threading.enumerate()) - {threading.get_ident()}
    found = _had(module, answers)
    if others:
        found = {name: _by_thread(found[name], getattr(module, name), others) for name in found}
    return patched(module, **found)


def _by_thread(stand_in: Any, original: Any, others: frozenset[int | None]) -> Any:
    """Return what calls the original in other threads; as a class where the stand-in is one."""

    def called(*args: Any, **kwargs: Any) -> Any:
        chosen = original if threading.get_ident() in others else stand_in
        return chosen(*args, **kwargs)

    if not isinstance(stand_in, type):
        return called

    class Either(type(stand_in)):  # type: ignore[misc]
        def __call__(cls, *args: Any, **kwargs: Any) -> Any:
            if cls is not either:  # a class of the user's that is made of it
                return super().__call__(*args, **kwargs)
            return called(*args, **kwargs)

        def __instancecheck__(cls, value: object) -> bool:
            known = (stand_in, original) if isinstance(original, type) else stand_in
            return isinstance(value, known)

    either = Either(stand_in.__name__, (stand_in,), {})
    return either


def _had(module: ModuleType, answers: dict[str, Any]) -> dict[str, Any]:
    """Return the answers that a module of this PyTorch has a name for."""
    return {name: answer for name, answer in answers.items() if hasattr(module, name)}


def _description(spec: GpuSpec) -> dict[str, Any]:
    """Return what takes the place of functions of `torch.cuda` that describe a card, by name."""
    major, minor = spec.compute_capability
    properties = Properties(
        name=spec.name,
        major=major,
        minor=minor,
        total_memory=spec.capacity_bytes,
        # the same on every card since compute capability 7.0, but for the first, a usual number
        multi_processor_count=_MULTIPROCESSORS,
        warp_size=32,
        regs_per_multiprocessor=65536,
        shared_memory_per_block=49152,
        max_threads_per_block=1024,
        max_threads_per_multi_processor=2048,
        is_integrated=0,
        is_multi_gpu_board=0,
        L2_cache_size=_CACHE_BYTES,
        memory_bus_width=4096,
        memory_clock_rate=1_500_000,
        clock_rate=1_500_000,
        pci_bus_id=0,
        pci_device_id=0,
        pci_domain_id=0,
        uuid="GPU-00000000-0000-0000-0000-000000000000",
        gcnArchName="",
        shared_memory_per_block_optin=101376,
        shared_memory_per_multiprocessor=102400,
    )
    return {
        "get_arch_list": lambda: note_question("capability", [f"sm_{major}{minor}"]),
        "get_device_capability": lambda device=None: note_question("capability", (major, minor)),
        "get_device_name": lambda device=None: note_question("card", spec.name),
        "get_device_properties": lambda device=None: properties,
        "is_bf16_supported": lambda including_emulation=True: True,
        "is_tf32_supported": lambda: note_question("capability", major >= 8),
        "mem_get_info": lambda device=None: note_question(
            "card", (spec.capacity_bytes, spec.capacity_bytes)
        ),
    }


def _emulation() -> dict[str, Any]:
    """Return what takes the place of other functions and classes of `torch.cuda`, by name."""
    no_bytes = """
        memory_allocated max_memory_allocated memory_reserved max_memory_reserved memory_cached
        max_memory_cached device_memory_used utilization memory_usage temperature power_draw
        clock_rate get_sync_debug_mode initial_seed
    """
    no_effect = """
        synchronize empty_cache manual_seed manual_seed_all set_rng_state
        set_rng_state_all reset_peak_memory_stats reset_max_memory_allocated
        reset_max_memory_cached reset_accumulated_memory_stats set_per_process_memory_fraction
        init ipc_collect seed seed_all set_stream set_sync_debug_mode
    """
    return {
        **dict.fromkeys(no_bytes.split(), lambda device=None: 0),
        **dict.fromkeys(no_effect.split(), _do_nothing),
        **dict.fromkeys(("is_available", "is_initialized"), lambda: True),
        **_STREAMS,
        **dict.fromkeys(("device", "device_of"), Inert),
        "device_count": lambda: 1,
        "can_device_access_peer": lambda device, peer: False,
        "is_current_stream_capturing": lambda: False,
        "memory_stats": lambda device=None: defaultdict(int),
        "memory_summary": lambda device=None, abbreviated=False: "",
        "memory_snapshot": lambda *args: [],
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "get_rng_state_all": lambda: [torch.get_rng_state()],
    }


def _apply_to_fakes(
    module: nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True
) -> nn.Module:
    """Do what `Module._apply` does to modules of fake tensors; leave real ones where they are.

    `Module._apply` swaps a fake parameter with what it becomes, and fails where anything else holds
    the parameter. A parameter of several modules becomes one of all of them. A real module that
    user code moves to the GPU stays where it is; an op that uses its tensors moves copies.
    """
    made: dict[int, tuple[Tensor, nn.Parameter]] = getattr(change, "__dict__", {}).setdefault(
        "_made", {}
    )
    parameters: dict[str, Any] = module._parameters
    buffers: dict[str, Any] = module._buffers
    if recurse:
        for child in module.children():
            child._apply(change)
    with torch.no_grad():
        for name, parameter in parameters.items():
            if not isinstance(parameter, FakeTensor):
                continue
            if id(parameter) in made:
                parameters[name] = made[id(parameter)][1]
                continue
            changed = change(parameter)
            if changed is not parameter:
                parameters[name] = nn.Parameter(changed, parameter.requires_grad)
                made[id(parameter)] = parameter, parameters[name]
        for name, buffer in buffers.items():
            if isinstance(buffer, FakeTensor):
                buffers[name] = change(buffer)
    return module
