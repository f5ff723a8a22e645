"""The walk over everything that the user's step can reach.

Objects are copied; functions, classes and what cannot be copied stay what they are, and the copies
are put where those read their objects from (`places.py`) while a run lasts.

Invariant: what was one object is one object among the copies, and no original is changed.
"""

from __future__ import annotations

import copyreg
import datetime
import decimal
import enum
import functools
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import PurePath
from types import (
    BuiltinFunctionType,
    CellType,
    CodeType,
    FunctionType,
    GeneratorType,
    GetSetDescriptorType,
    MemberDescriptorType,
    MethodDescriptorType,
    MethodWrapperType,
    ModuleType,
    WrapperDescriptorType,
)
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from autobatch.devices.kinds import CONTAINERS, MAKERS
from autobatch.devices.places import (
    FilePlace,
    Place,
    Stage,
    attributes_of,
    cell,
    defaults_of,
    entries_of,
)
from autobatch.devices.whose import files_read_by, holds_tensors, is_kept
from autobatch.errors import WorkloadError
from autobatch.support.owners import is_own_class, is_own_function, is_own_module
from autobatch.support.wording import argument, given, passing

__all__ = ["Walk"]

_ATOMS: tuple[type, ...] = (
    type(None),
    type(...),
    type(NotImplemented),
    int,
    float,
    complex,
    str,
    bytes,
    range,
    slice,
    enum.Enum,
    decimal.Decimal,
    datetime.date,
    datetime.time,
    datetime.timedelta,
    PurePath,
    re.Pattern,
    BuiltinFunctionType,
    CodeType,
    GetSetDescriptorType,
    MemberDescriptorType,
    MethodDescriptorType,
    MethodWrapperType,
    ModuleType,
    WrapperDescriptorType,
    torch.device,
    torch.dtype,
    torch.layout,
    torch.memory_format,
    torch.Size,
)
"""Types whose values hold nothing that a run could change."""

_PLAIN = frozenset((type(None), bool, int, float, str, torch.device, torch.dtype))
"""The most frequent of them."""

_MOST_ARRAY_BYTES = 2**26
"""Bytes of a NumPy array up to which it is copied."""


class Walk:
    """Copies objects, and finds the places from which functions and classes read theirs.

    Attributes:
        notes: what could not be copied although a run may change it, or it holds tensors.
    """

    def __init__(self) -> None:
        self.notes: list[str] = []
        self._memo: dict[int, Any] = {}
        self._originals: list[Any] = []  # keeps ids in the memo from being reused
        self._places: list[Place] = []
        self._waiting: list[Callable[[], None]] = []
        self._names: dict[int, set[str]] = {}  # of globals, by the module that they are of
        self._global_places: dict[int, Place] = {}
        self._shares_state = False
        self._under_way: set[int] = set()  # ids of what copies itself, once its parts are copied

    # What a subclass decides.

    def tensor(self, original: Tensor, *, is_bound: bool) -> Tensor:
        """Return the counterpart of a tensor; one that a name is bound to may be moved."""
        raise NotImplementedError

    def model(self, model: nn.Module) -> nn.Module:
        """Return the copy of a module."""
        raise NotImplementedError

    def optimizer(self, given: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Return the copy of an optimizer."""
        raise NotImplementedError

    # The walk.

    def walked(self) -> Stage:
        """Go through all functions and classes that were met; return the places that they read."""
        while self._waiting:
            self._waiting.pop(0)()
        self._shares_state = False
        return Stage(self._places)

    def close(self) -> None:
        """Let go of all copies: a tensor that views another is in no cycle that Python can see."""
        self._memo.clear()
        self._originals.clear()
        for place in self._places:
            place.others.clear()

    def copied(self, value: Any, *, is_bound: bool = False) -> Any:
        """Return the counterpart of any value; of functions, classes and what is kept, itself."""
        kind = type(value)
        if kind in _PLAIN:
            return value
        known = self._memo.get(id(value), self)
        if known is not self:
            return known
        if kind in CONTAINERS:
            return MAKERS[kind](self, value)
        if issubclass(kind, _ATOMS):
            return value
        if isinstance(value, Tensor):
            return value if self._shares_state else self.tensor(value, is_bound=is_bound)
        if isinstance(value, type):
            return self._as_it_is(value, lambda: self._class(value))
        if kind is FunctionType:
            return self._as_it_is(value, lambda: self._function(value))
        if isinstance(value, (nn.Module, torch.optim.Optimizer)):
            if self._shares_state:
                return value
            return self.model(value) if isinstance(value, nn.Module) else self.optimizer(value)
        if is_kept(value):
            return self._kept(value)
        return self._object(value, kind)

    def remember(self, original: Any, duplicate: Any) -> None:
        """Take one object for the counterpart of another from now on."""
        self._memo[id(original)] = duplicate
        self._originals.append(original)

    def counterpart(self, original_id: int) -> Any:
        """Return the counterpart of what has an id; None where it is not known."""
        return self._memo.get(original_id)

    def copies_itself(self, value: Any) -> bool:
        """Whether an object's own `__deepcopy__` is going to make its copy."""
        return id(value) in self._under_way and id(value) not in self._memo

    def _as_it_is(self, value: Any, later: Callable[[], None]) -> Any:
        self.remember(value, value)
        shares = self._shares_state

        def visit() -> None:
            self._shares_state = shares
            later()

        self._waiting.append(visit)
        return value

    def _object(self, value: Any, kind: type) -> Any:
        maker = MAKERS.get(kind)
        if maker is not None:
            return maker(self, value)
        if kind.__module__ == "numpy":
            return self._array(value)
        if isinstance(value, torch.Generator):
            self.remember(value, value.clone_state())
            return self._memo[id(value)]
        if hasattr(kind, "__del__") and not isinstance(value, nn.Module):
            return self._kept(value, deeply=True)  # a copy would end what the original uses
        try:
            return self._by_protocol(value, kind)
        except (RecursionError, WorkloadError):
            raise
        except Exception as error:  # what it is made of may be changed in place instead
            if isinstance(value, nn.Module):
                if _is_sharded(value):
                    raise WorkloadError(
                        f"{kind.__name__} is sharded already, and cannot be copied for the probe: "
                        f"pass the model as it is before fully_shard, with {argument('world_size')}"
                        f" and {given('sharding', 'fsdp')}, or {passing('sharding', 'f')} where f "
                        "is the function that applies fully_shard"
                    ) from error
                raise WorkloadError(
                    f"{kind.__name__} cannot be copied for the probe ({error}): remove what cannot "
                    "be deep-copied from it, or build it in a function and pass a Workload"
                ) from error
            self._memo.pop(id(value), None)
            return self._kept(value, deeply=True)

    def _by_protocol(self, value: Any, kind: type) -> Any:
        """Copy as `copy.deepcopy` does: by `__deepcopy__`, or by `__reduce_ex__`."""
        if is_own_class(kind):
            self.copied(kind)
        if hasattr(kind, "__deepcopy__"):
            self._under_way.add(id(value))
            for part in getattr(value, "__dict__", {}).values():
                self.remember(part, self.copied(part))
            self._under_way.discard(id(value))
            with _TensorCopies(self):
                duplicate = value.__deepcopy__(self._memo)
            if duplicate is value:
                return self._kept(value, deeply=True)
            self.remember(value, duplicate)
            return duplicate
        reduce = copyreg.dispatch_table.get(kind)
        reduced = reduce(value) if reduce else value.__reduce_ex__(4)
        if isinstance(reduced, str):  # a name that is found again
            self.remember(value, value)
            return value
        return self._rebuilt(value, *reduced)

    def _rebuilt(
        self,
        value: Any,
        make: Callable[..., Any],
        arguments: tuple[Any, ...],
        state: Any = None,
        items: Iterable[Any] | None = None,
        entries: Iterable[Any] | None = None,
        set_state: Callable[[Any, Any], None] | None = None,
    ) -> Any:
        duplicate = make(*(self.copied(argument) for argument in arguments))
        self.remember(value, duplicate)
        if state is not None:
            if state is getattr(value, "__dict__", None):
                state = {name: self.copied(part) for name, part in vars(value).items()}
            else:
                state = self.copied(state)
            (set_state or _set_state)(duplicate, state)
        for item in items or ():
            duplicate.append(self.copied(item))
        for key, part in entries or ():
            duplicate[self.copied(key)] = self.copied(part)
        return duplicate

    def _array(self, value: Any) -> Any:
        numbers = getattr(value, "dtype", None)
        if numbers is None:  # a ufunc, a generator of random numbers
            return self._by_protocol(value, type(value))
        if numbers.hasobject or value.nbytes > _MOST_ARRAY_BYTES:
            self.remember(value, value)
        else:
            self.remember(value, value.copy())
        return self._memo[id(value)]

    # What stays what it is.

    def _kept(self, value: Any, *, deeply: bool = False) -> Any:
        """Keep an object; its attributes are as before after a run, their copies used in it."""
        self.remember(value, value)
        for file in files_read_by(value):
            self.place(FilePlace(file))
        own = getattr(value, "__dict__", None)
        if isinstance(own, dict):
            place = self.place(entries_of(own, in_order=True))
            if deeply:
                place.others = self.others(own)
        elif isinstance(value, GeneratorType):
            code = value.gi_code
            self.notes.append(
                f"the step reaches the generator {code.co_name} ({PurePath(code.co_filename).name}:"
                f"{code.co_firstlineno}), which cannot be copied: what the probe took from it is "
                "gone, so make it again before training"
            )
        elif holds_tensors(value):
            self.notes.append(
                f"the step reaches a {type(value).__name__} that holds tensors and cannot be "
                "copied: check that it is as before, or make it again before training"
            )
        return value

    def place(self, place: Place) -> Place:
        """Note a place that code reads its objects from."""
        self._places.append(place)
        return place

    def others(self, names: dict[Any, Any]) -> dict[Any, Any]:
        """Return the counterparts that are not the originals, by name."""
        found = {}
        for name, value in list(names.items()):
            duplicate = self.copied(value, is_bound=True)
            if duplicate is not value:
                found[name] = duplicate
        return found

    # Where functions and classes read their objects.

    def _function(self, function: FunctionType) -> None:
        for variable in function.__closure__ or ():
            self._cell(variable)
        if function.__defaults__ or function.__kwdefaults__:
            place = self.place(defaults_of(function))
            place.others = self.others(
                {"__defaults__": function.__defaults__, "__kwdefaults__": function.__kwdefaults__}
            )
        if is_own_function(function) or function.__dict__:
            place = self.place(entries_of(function.__dict__, in_order=True))
            place.others = self.others(function.__dict__)
        if is_own_function(function):
            self._globals(function.__globals__, _names(function.__code__))

    def _cell(self, variable: CellType) -> None:
        if id(variable) in self._memo:
            return
        self.remember(variable, variable)
        place = self.place(cell(variable))
        try:
            held = variable.cell_contents
        except ValueError:  # not filled yet
            return
        place.others = self.others({"cell_contents": held})

    def _globals(self, found: dict[str, Any], names: set[str]) -> None:
        known = self._names.get(id(found))
        if known is None:
            known = self._names[id(found)] = set()
            self._global_places[id(found)] = self.place(entries_of(found))
        place = self._global_places[id(found)]
        new = {name for name in names - known if name in found and not _is_special(name)}
        known |= new
        for name in sorted(new):
            value = found[name]
            if isinstance(value, ModuleType):
                if is_own_module(value):
                    self._globals(vars(value), names)
                continue
            if isinstance(value, (type, FunctionType)) and not _is_own(value):
                continue
            place.others |= self.others({name: value})

    def _class(self, kind: type) -> None:
        if not is_own_class(kind) or issubclass(kind, enum.Enum):
            return
        for base in kind.__bases__:
            self.copied(base)
        place = self.place(attributes_of(kind))
        for name, value in list(vars(kind).items()):
            for function in _functions_of(value):
                self.copied(function)
            if not _is_special(name) and not isinstance(value, _DESCRIPTORS):
                place.others |= self.others({name: value})


_DESCRIPTORS = (
    FunctionType,
    staticmethod,
    classmethod,
    property,
    functools.cached_property,
    GetSetDescriptorType,
    MemberDescriptorType,
)


def _is_sharded(module: nn.Module) -> bool:
    """Whether FSDP2 shards a module."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)


def _set_state(duplicate: Any, state: Any) -> None:
    """Give a copy its state, as `copy.deepcopy` does."""
    if hasattr(type(duplicate), "__setstate__"):  # asking the object may ask its state
        duplicate.__setstate__(state)
        return
    parts, slots = state if isinstance(state, tuple) and len(state) == 2 else (state, {})
    if parts:
        duplicate.__dict__.update(parts)
    for name, part in (slots or {}).items():
        object.__setattr__(duplicate, name, part)


def _functions_of(value: Any) -> Iterator[FunctionType]:
    """Yield the functions behind an attribute of a class."""
    parts: Iterable[Any]
    if isinstance(value, property):
        parts = (value.fget, value.fset, value.fdel)
    elif isinstance(value, (staticmethod, classmethod)):
        parts = (value.__func__,)
    elif isinstance(value, functools.cached_property):
        parts = (value.func,)
    else:
        parts = (value,)
    return (part for part in parts if isinstance(part, FunctionType))


def _is_own(value: type | FunctionType) -> bool:
    if isinstance(value, type):
        return is_own_class(value)
    # a decorator of a library's may be around a function of the user's
    return is_own_function(value) or value.__closure__ is not None


def _is_special(name: Any) -> bool:
    return isinstance(name, str) and name.startswith("__") and name.endswith("__")


@functools.cache
def _names(code: CodeType) -> set[str]:
    """Return the global names that a function's code, or code inside of it, may use."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= _names(constant)
    return names


class _TensorCopies(TorchFunctionMode):
    """Lets `copy.deepcopy` take the walk's counterparts of tensors, and clone no memory."""

    def __init__(self, walk: Walk):
        super().__init__()
        self._walk = walk

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not Tensor.__deepcopy__:
            return func(*args, **(kwargs or {}))
        return self._walk.copied(args[0])
