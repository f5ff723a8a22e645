"""State of a block that changes from what it was in a forward pass: a second one changes it again.

A block that is checkpointed runs twice in each micro-batch. That leaves its numbers the same unless
it writes what it also reads: averages, steps of a power iteration, counters, the end of a queue.
What is written anew from the inputs alone is the same after both runs.

Invariant: only a simulated copy is looked at, in its first two passes, and no tensor of it is held.
"""

from __future__ import annotations

import functools
import random
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.spectral_norm import SpectralNorm

from autobatch.errors import LeverError
from autobatch.support.torch_private import (
    DisableTorchFunction,
    FakeTensor,
    NormBase,
    OpOverload,
    SpectralParametrization,
    TorchDispatchMode,
    tree_leaves,
)

__all__ = ["RunTwice", "has_spectral_norm", "keeps_averages"]

_OVERWRITING = frozenset(
    "copy_ zero_ fill_ set_ normal_ uniform_ bernoulli_ random_ exponential_".split()
)
"""Ops that write into their first argument without reading it."""

_SAME_TWICE = frozenset("clamp_ clamp_min_ clamp_max_ relu_ renorm_ embedding_renorm_".split())
"""Ops that read what they write, and change nothing when they run again."""

_AVERAGING = frozenset("native_batch_norm cudnn_batch_norm miopen_batch_norm".split())
"""Ops whose schemas do not say that they write the running averages, arguments 3 and 4."""

_VALUES = (bool, int, float, complex, str, bytes, type(None))
_CONTAINERS = (list, tuple, dict, set, deque)
_MODULES_OWN = frozenset(vars(nn.Module()))
_MOST_ITEMS = 1000
"""Of longer containers, the number of items is compared."""

_SOURCES = "_read_from"
"""Attribute of a simulated tensor: who follows it, and the state that it was computed from."""


def keeps_averages(block: nn.Module) -> bool:
    """Whether a block has running averages of PyTorch's norms, whose momentum can make up for it.

    >>> keeps_averages(nn.InstanceNorm1d(2, track_running_stats=True))
    True
    """
    return any(isinstance(m, NormBase) and m.track_running_stats for m in block.modules())


def has_spectral_norm(block: nn.Module) -> bool:
    """Whether a weight of a block is divided by its spectral norm, in either of PyTorch's ways.

    >>> has_spectral_norm(nn.Sequential(nn.utils.spectral_norm(nn.Linear(2, 2))))
    True
    """
    return any(_is_spectral(module) for module in block.modules())


def _is_spectral(module: nn.Module) -> bool:
    hooks = module._forward_pre_hooks.values()
    is_hooked = any(isinstance(hook, SpectralNorm) for hook in hooks)
    return is_hooked or isinstance(module, SpectralParametrization)


@dataclass(frozen=True, slots=True)
class RunTwice:
    """Lets blocks of a simulated model be looked at, and changes nothing of what they compute.

    A run ends in an error where a block cannot run twice. It comes before all other changes, after
    which blocks may have other names.

    Attributes:
        names: of the blocks.
    """

    names: tuple[str, ...]

    def __call__(self, model: nn.Module) -> None:
        """Look at the first passes of each block; one on a real device is left as it is."""
        for name in self.names:
            block = model.get_submodule(name)
            if any(type(parameter.data) is FakeTensor for parameter in block.parameters()):
                block.forward = _WatchedForward(name, block)


class _WatchedForward:
    """The forward of a block, which looks at what it changes when it runs first, and once more.

    It is no function in a function: the frame of one would hold the block in an error's traceback.
    """

    def __init__(self, name: str, block: nn.Module) -> None:
        """Take the block and its name."""
        functools.update_wrapper(self, block.forward)
        self._name, self._block, self._plain = name, block, block.forward
        self._runs = 0
        self._left: dict[str, str] = {}  # values of Python after the first run
        self._changed: list[str] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block.

        Raises:
            LeverError: it cannot run twice.
        """
        self._runs += 1
        if self._runs == 1:
            return self._first(args, kwargs)
        if self._runs == 2:
            return self._second(args, kwargs)
        if self._changed:  # what is raised in a backward pass leaves much behind
            raise self._error(f"changes its {', '.join(self._changed)} each time", twice=True)
        return self._plain(*args, **kwargs)

    def _first(self, args: Any, kwargs: Any) -> Any:
        drawn, held = _random_states(), dict(_state_of(self._block))
        with DisableTorchFunction():
            watch = _Watch({_storage(tensor): slot for slot, tensor in held.items()})
        with watch:
            output = self._plain(*args, **kwargs)
        replaced = {
            slot
            for slot, tensor in _state_of(self._block)
            if tensor is not held.get(slot) and slot in watch.sources_of(tensor)
        }
        if changed := sorted(watch.changed | replaced):
            raise self._error(f"changes its {', '.join(changed)} from what it was", twice=True)
        if _random_states() != drawn:
            raise self._error(
                "draws random numbers of Python or NumPy, others each time", twice=True
            )
        if not _is_waited_for(output) and keeps_averages(self._block):
            raise self._error(
                "does not run again, as nothing in it or before it is trained, and its averages "
                "need no correction: leave it in evaluation mode, or checkpointing out"
            )
        self._left = _values_of(self._block)
        return output

    def _second(self, args: Any, kwargs: Any) -> Any:
        """Run the block once more: what is written from the inputs alone is then the same."""
        try:
            return self._plain(*args, **kwargs)
        finally:  # an exception ends it where the backward pass has all that it needs
            now = _values_of(self._block)
            self._changed = sorted(name for name in now if now[name] != self._left.get(name))

    def _error(self, what: str, *, twice: bool = False) -> LeverError:
        if twice:
            what += (
                ", and a block that is checkpointed runs twice: keep that out of its forward, or "
                "leave checkpointing out"
            )
        return LeverError(f"{self._name} ({type(self._block).__name__}) {what}")


class _Watch(TorchDispatchMode):
    """Follows from which state of a block tensors were computed.

    Attributes:
        changed: the names of state that was written from what it was.
    """

    def __init__(self, slots: Mapping[int, str]) -> None:
        """Take the names of state by its storage."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.changed: set[str] = set()
        self._slots = slots
        self._token = object()  # the next block has state of the same names
        self._told: set[str] = set()  # of which Python got numbers, which may decide anything

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run an op, and follow it."""
        output = func(*args, **(kwargs or {}))
        with DisableTorchFunction():
            self._follow(func, args, kwargs or {}, output)
        return output

    def _follow(
        self, func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any
    ) -> None:
        name = func.overloadpacket.__name__
        given = list(_simulated(args, kwargs))
        read = frozenset().union(*map(self._read_from, given))
        if name == "_local_scalar_dense":
            self._told |= read
        if name in _AVERAGING and args[5]:
            self.changed |= {slot for mean in args[3:5] if (slot := self._slot(mean)) is not None}
        written = list(_simulated([*_written(func, args, kwargs)], {}))
        if written:
            is_read = name.endswith("_") and name not in _OVERWRITING
            own = {id(tensor) for tensor in written}
            others = frozenset().union(
                *(self._read_from(tensor) for tensor in given if id(tensor) not in own)
            )
            read = read if is_read else others
            for tensor in written:
                slot = self._slot(tensor)
                if slot is not None and name not in _SAME_TWICE and slot in read | self._told:
                    self.changed.add(slot)
        if read:
            for tensor in _simulated((output, *written), {}):
                if not read <= (known := self.sources_of(tensor)):
                    setattr(tensor, _SOURCES, (self._token, known | read))

    def sources_of(self, tensor: Tensor) -> frozenset[str]:
        """Return the state that a tensor was computed from, as far as this one has followed it."""
        token, sources = tensor.__dict__.get(_SOURCES, (None, None))
        return sources if token is self._token and sources is not None else frozenset()

    def _read_from(self, tensor: Tensor) -> frozenset[str]:
        """Return the state that a tensor was computed from, itself included."""
        slot = self._slot(tensor)
        known = self.sources_of(tensor)
        return known if slot is None else known | {slot}

    def _slot(self, tensor: Any) -> str | None:
        return self._slots.get(_storage(tensor)) if _has_storage(tensor) else None


def _written(func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Any]:
    """Yield the arguments that an op writes, by its schema."""
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield args[place] if place < len(args) else kwargs.get(argument.name)


def _state_of(block: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield names and tensors that modules of a block hold, but those that are made up for."""
    for name, module in block.named_modules():
        if isinstance(module, NormBase) or _is_spectral(module):
            continue
        for held in (module._parameters, module._buffers, vars(module)):
            for key, tensor in held.items():
                if _has_storage(tensor):
                    yield f"{name}.{key}".removeprefix("."), tensor


def _values_of(block: nn.Module) -> dict[str, str]:
    """Return what modules of a block hold of Python's own numbers and texts, also in containers."""
    return {
        f"{name}.{key}".removeprefix("."): told
        for name, module in block.named_modules()
        for key, value in vars(module).items()
        if key not in _MODULES_OWN and (told := _told(value)) is not None
    }


def _told(value: Any) -> str | None:
    """Return a text that is another one where a value is; None for what is not looked at."""
    if isinstance(value, _VALUES):
        return repr(value)
    if isinstance(value, _CONTAINERS):
        parts = value.values() if isinstance(value, dict) else value
        first = islice(parts, _MOST_ITEMS)
        return f"{len(value)} {[repr(part) for part in first if isinstance(part, _VALUES)]}"
    return None


def _is_waited_for(output: Any) -> bool:
    """Whether the backward pass goes through an output; taken to where no tensor is seen."""
    tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
    return not tensors or any(tensor.requires_grad for tensor in tensors)


def _simulated(args: Any, kwargs: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves((args, kwargs)) if _has_storage(leaf))


def _has_storage(value: Any) -> bool:
    return type(value) is FakeTensor and value.layout is torch.strided


def _storage(tensor: Tensor) -> int:
    key: int = tensor.untyped_storage()._cdata
    return key


def _random_states() -> tuple[Any, ...]:
    """Return where the generators of Python and NumPy are, which a checkpoint does not put back."""
    numpy = sys.modules.get("numpy")
    return random.getstate(), None if numpy is None else repr(numpy.random.get_state()[1:])
