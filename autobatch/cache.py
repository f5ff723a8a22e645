"""Plans that were made before, so that the same question is answered in milliseconds.

Invariant: two workloads share a key only if nothing that a plan depends on tells them apart. What
cannot be described so that another process would agree makes its key unique: a stale plan is far
worse than one made again. No tensor's values are read; nothing is pickled.
"""

from __future__ import annotations

import dis
import functools
import hashlib
import importlib.metadata
import importlib.util
import inspect
import logging
import os
import platform
import random
import re
import secrets
import struct
import sys
import sysconfig
import threading
import types
import weakref
from collections import deque, namedtuple
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import fields
from enum import Enum
from pathlib import Path, PurePath
from types import BuiltinFunctionType, CodeType, FunctionType, MappingProxyType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from autobatch import _version
from autobatch.errors import FileError
from autobatch.gpus import GpuSpec
from autobatch.plan import Plan
from autobatch.records import RecordError
from autobatch.workload import Workload

__all__ = ["find", "folder", "plan_key", "store"]

ENTRIES_KEPT = 200
LARGEST_SOURCE_BYTES = 5_000_000
LARGEST_ARRAY_BYTES = 2**24
MOST_TOKENS = 1_000_000

# No SHA-256 begins like this: keys of workloads that cannot be described, never to be stored.
_UNIQUE = "0" * 32


def folder() -> Path:
    """Return where plans are kept: `$AUTOBATCH_CACHE_DIR`, or the user's cache folder.

    Raises:
        RuntimeError: the user has no home folder.
    """
    if chosen := os.environ.get("AUTOBATCH_CACHE_DIR"):
        return Path(chosen)
    system = platform.system()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        base = Path(shared)
    elif system == "Windows" and (local := os.environ.get("LOCALAPPDATA")):
        base = Path(local)
    else:
        base = Path.home() / ("Library/Caches" if system == "Darwin" else ".cache")
    return base / "autobatch" / "plans"


def find(key: str) -> Plan | None:
    """Return the plan stored under a key; None, and no broken file, where there is none."""
    try:
        file = folder() / f"{key}.json"
    except RuntimeError:
        return None
    try:
        plan = Plan.load(file)
    except FileError:
        with suppress(OSError):
            file.unlink(missing_ok=True)
        return None
    with suppress(OSError):
        os.utime(file)
    return plan


def store(key: str, plan: Plan) -> None:
    """Keep a plan under its key, and the 200 most recently used in all; silent where it cannot."""
    if key.startswith(_UNIQUE):
        return
    with suppress(FileError, OSError, RecordError, RuntimeError):
        home = folder()
        home.mkdir(parents=True, exist_ok=True)
        stored = plan.save(home / f"{key}.json")
        others = sorted(
            (file for file in home.glob("*.json") if file != stored), key=_used, reverse=True
        )
        for file in others[ENTRIES_KEPT - 1 :]:
            file.unlink(missing_ok=True)


def _used(file: Path) -> int:
    try:
        return file.stat().st_mtime_ns
    except FileNotFoundError:  # another process dropped it
        return 0


def plan_key(workload: Workload, gpu: GpuSpec, options: Mapping[str, object]) -> str:
    """Return a SHA-256 in hexadecimal of everything that a plan depends on.

    Covers the model's structure, the code of the user's own classes and functions with the globals
    they use, shapes and dtypes, the optimizer, one batch of two samples, the GPU, torch's switches,
    versions, environment settings and the user's loaded source files. Values of tensors, devices,
    train/eval mode and random state do not count.

    Args:
        workload: what would run; `workload.batch(2)` is called with the random state kept.
        gpu: the card; the sources of its figures do not count.
        options: whatever else decides the answer, such as the target; plain values.
    """
    fingerprint = _Fingerprint()
    try:
        with _random_state_kept():
            fingerprint.add(workload.model)  # first, so that its parameters number the others
            fingerprint.batch(workload.batch)
            for field in fields(workload):
                if field.name not in ("model", "batch"):
                    fingerprint.add((field.name, getattr(workload, field.name)))
            for field in fields(gpu):
                if field.name != "sources":
                    fingerprint.add((field.name, getattr(gpu, field.name)))
            fingerprint.add(sorted(options.items()))
            fingerprint.surroundings()
            return fingerprint.finish()
    except Exception:  # whatever the user's objects raise, the tuner will meet it and say so
        return _UNIQUE + secrets.token_hex(16)


@contextmanager
def _random_state_kept() -> Iterator[None]:
    numpy: Any = sys.modules.get("numpy")
    state = random.getstate()
    numpy_state = numpy.random.get_state() if numpy else None
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(state)
            if numpy:
                numpy.random.set_state(numpy_state)


class _UnstableError(Exception):
    """A value that another process could not describe in the same way."""


_ATOMS = frozenset(
    {bool, int, float, complex, str, bytes, range, type(None), type(...), type(NotImplemented)}
    | {torch.dtype, torch.layout, torch.memory_format}
)
_CODE = (
    "co_name co_code co_consts co_names co_varnames co_freevars co_cellvars co_flags co_argcount "
    "co_posonlyargcount co_kwonlyargcount"
).split()
_DESCRIPTORS = (
    types.MethodDescriptorType,
    types.WrapperDescriptorType,
    types.GetSetDescriptorType,
    types.MemberDescriptorType,
    types.ClassMethodDescriptorType,
)
_PARTS: dict[type, tuple[str, ...]] = {
    CodeType: (*_CODE, *(["co_exceptiontable"] if sys.version_info >= (3, 11) else [])),
    types.MethodType: ("__func__", "__self__"),
    BuiltinFunctionType: ("__module__", "__qualname__", "__self__"),
    types.MethodWrapperType: ("__name__", "__self__"),
    functools.partial: ("func", "args", "keywords", "__dict__"),
    functools.cached_property: ("func",),
    type(functools.cache(len)): ("__wrapped__",),
    staticmethod: ("__func__",),
    classmethod: ("__func__",),
    property: ("fget", "fset", "fdel"),
    slice: ("start", "stop", "step"),
    re.Pattern: ("pattern", "flags"),
    torch._ops.OpOverload: ("_name",),
    torch._ops.OpOverloadPacket: ("_qualified_op_name",),
    **dict.fromkeys(_DESCRIPTORS, ("__objclass__", "__name__")),
}
# What holds nothing that a plan depends on: random states, locks, logs.
_IGNORED = (
    random.Random,
    torch.Generator,
    type(threading.Lock()),
    type(threading.RLock()),
    logging.Logger,
    type(os.environ),
    type(vars(namedtuple("_", "field"))["field"]),  # its class lists the fields
)
_IGNORED_MODULES = ("numpy.random", "pybind11_builtins")
_CLASS_NOISE = frozenset(
    """__dict__ __weakref__ __doc__ __module__ __qualname__ __annotations__ __annotate__
    __annotate_func__ __annotations_cache__ __firstlineno__ __static_attributes__ __orig_bases__
    __parameters__ _abc_impl""".split()
)
# Notes of transformers and of Dynamo that differ between processes and change no memory.
_NOISE = frozenset(
    "_is_hf_initialized _original_object_hash _torchdynamo_wrapper_id __dynamo_disable".split()
)
_PLAIN = (bool, int, float, str, type(None))
_LIBRARY_ROOTS = tuple(
    f"{os.path.abspath(path)}{os.sep}"
    for path in (
        *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")),
        os.path.dirname(torch.__file__),
        os.path.dirname(__file__),
    )
)
_LIBRARY_FOLDERS = tuple(f"{os.sep}{name}{os.sep}" for name in ("site-packages", "dist-packages"))
_ENVIRONMENT = """
    PYTORCH_CUDA_ALLOC_CONF PYTORCH_ALLOC_CONF CUBLAS_WORKSPACE_CONFIG CUBLASLT_WORKSPACE_SIZE
    TORCH_CUBLASLT_UNIFIED_WORKSPACE CUDNN_CONV_WSCAP_DBG
""".split()
_SWITCHES = """
    version.git_version version.cuda get_default_dtype get_default_device is_autocast_enabled
    get_float32_matmul_precision is_grad_enabled is_inference_mode_enabled
    are_deterministic_algorithms_enabled is_deterministic_algorithms_warn_only_enabled
    utils.deterministic.fill_uninitialized_memory backends.fp32_precision backends.cudnn.enabled
    backends.cudnn.benchmark backends.cudnn.deterministic backends.cudnn.allow_tf32
    backends.cudnn.fp32_precision backends.cudnn.conv.fp32_precision
    backends.cudnn.rnn.fp32_precision backends.cuda.matmul.allow_tf32
    backends.cuda.matmul.fp32_precision backends.cuda.flash_sdp_enabled
    backends.cuda.mem_efficient_sdp_enabled backends.cuda.math_sdp_enabled
    backends.cuda.cudnn_sdp_enabled backends.cuda.fp16_bf16_reduction_math_sdp_allowed
    _C._accelerator_getAllocatorSettings nn.modules.module._global_forward_hooks
    nn.modules.module._global_forward_pre_hooks nn.modules.module._global_backward_hooks
    nn.modules.module._global_backward_pre_hooks optim.optimizer._global_optimizer_pre_hooks
    optim.optimizer._global_optimizer_post_hooks
""".split()


class _Fingerprint:
    """A hash of Python objects by what they are, the same in every process.

    Everything becomes length-prefixed text, each container with its kind and size, so that no two
    structures give the same bytes. An object met again is named by the number of its first visit:
    ties between tensors are kept, and cycles end.
    """

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._tokens = 0
        self._seen: dict[int, int] = {}
        self._alive: list[object] = []  # keeps ids from being reused
        self._storages: dict[int, int] = {}
        self._pending: deque[object] = deque()  # what code refers to; nested, it would go too deep
        self._libraries: dict[str, bool] = {}
        self._described: set[str] = set()
        self._slots: dict[type, dict[str, Any]] = {}

    def finish(self) -> str:
        """Describe what is still pending and return the hash."""
        while self._pending:
            self.add(self._pending.popleft())
        return self._hash.hexdigest()

    def batch(self, make: Any) -> None:
        """Add two samples, and the code that makes them: it may do otherwise for more."""
        self.add(make(2))
        while isinstance(make, functools.partial):
            make = make.func
        make = getattr(make, "__func__", make)
        self.add(make.__code__ if isinstance(make, FunctionType) else type(make))

    def surroundings(self) -> None:
        """Add versions, settings, torch's switches and the user's loaded source files."""
        self._text(
            _version.__version__,
            _own_source(),
            torch.__version__,
            *platform.python_version_tuple()[:2],
        )
        for name in _ENVIRONMENT:
            self.add((name, os.environ.get(name)))
        for name in _SWITCHES:
            self.add((name, _switch(name)))
        for name, module in sorted(sys.modules.items()):
            file = _file_of(module)
            if file and not self._is_library(name):
                self._text("source", name)
                self._file(file)

    def add(self, value: Any) -> None:
        """Describe any object.

        Raises:
            _UnstableError: no other process would describe it the same way.
        """
        kind = type(value)
        if kind in _ATOMS:
            self._text(kind.__name__, repr(value))
        elif kind is tuple or kind is torch.Size:
            self._items("tuple", value)
        elif kind is set or kind is frozenset:
            ordered = {_rank(item): item for item in value}
            if len(ordered) != len(value):
                raise _UnstableError("a set of things with one name")
            self._items("set", [ordered[rank] for rank in sorted(ordered)])
        elif id(value) in self._seen:
            self._text("again", str(self._seen[id(value)]))
        else:
            self._seen[id(value)] = len(self._seen)
            self._alive.append(value)
            self._describe(value, kind)

    def _describe(self, value: Any, kind: type) -> None:
        if isinstance(value, type):
            self._class(value)
        elif isinstance(value, ModuleType):
            self._text("module", value.__name__, _package_version(value.__name__))
        elif isinstance(value, FunctionType):
            self._function(value)
        elif kind in _PARTS:
            self._items(kind.__name__, [getattr(value, part) for part in _PARTS[kind]])
        elif isinstance(value, _IGNORED) or kind.__module__.startswith(_IGNORED_MODULES):
            self._text("ignored", kind.__qualname__)
        elif isinstance(value, torch.device):
            self._text("device", "cpu" if value.type == "meta" else value.type)
        elif isinstance(value, weakref.ref):
            self._items("weakref", [value()])
        elif isinstance(value, PurePath):
            self._text("path", str(value))
        elif (
            isinstance(value, (types.GenericAlias, types.UnionType)) or kind.__module__ == "typing"
        ):
            self._text("typing", _without_address(repr(value)))
        else:
            self.add(kind)
            if isinstance(value, Tensor):
                self._tensor(value)
            elif kind.__module__ == "numpy" and hasattr(value, "tobytes"):
                self._array(value)
            else:
                self._object(value, kind)

    def _object(self, value: Any, kind: type) -> None:
        """Add the items of a container, the value of a number, and all attributes."""
        known = True
        if isinstance(value, (dict, MappingProxyType)):
            pairs = dict.items(value) if isinstance(value, dict) else value.items()
            self._items("dict", [part for pair in pairs for part in pair])
        elif isinstance(value, (list, tuple)):
            self._items("list", value)
        elif isinstance(value, (int, float, complex, str, bytes)):
            base = next(base for base in kind.__mro__ if base in _ATOMS)
            self.add(base(value))
        else:
            known = False
        slots = self._slots.get(kind)
        if slots is None:
            slots = self._slots[kind] = _slots_of(kind)
        if not known and _hides_state(kind, len(slots)):
            module, name = getattr(value, "__module__", ""), getattr(value, "__qualname__", "")
            if not (name and self._is_library(module) and _named(module, name) is value):
                raise _UnstableError(f"{kind} holds more than attributes")
            self._text("of", module, name, _package_version(module))
        state = dict(getattr(value, "__dict__", {}))
        for name, member in slots.items():
            with suppress(AttributeError):
                state[name] = member.__get__(value)
        if isinstance(value, nn.Module):
            state.pop("training", None)
        elif kind.__module__ == "transformers.tokenization_utils_base":
            state.pop("_encodings", None)  # the tokenizer's own view of a batch
        self._attributes(state)

    def _attributes(self, attributes: Mapping[str, Any]) -> None:
        kept = {name: item for name, item in attributes.items() if name not in _NOISE}
        kept = _numbered(kept)
        self._text("attributes", str(len(kept)))
        for name, item in kept.items():
            self._text(name)
            self.add(item)

    def _tensor(self, tensor: Tensor) -> None:
        if hasattr(tensor, "__tensor_flatten__"):
            names, context = tensor.__tensor_flatten__()
            self._items("tensors", [getattr(tensor, name) for name in names])
            self.add(context)
        elif tensor.layout is not torch.strided or nn.parameter.is_lazy(tensor):
            raise _UnstableError(f"a tensor without strides: {tensor.layout}")
        else:
            address = tensor.untyped_storage()._cdata
            storage = self._storages.setdefault(address, len(self._storages))
            self.add((storage, tensor.storage_offset(), tensor.stride()))
        self.add((tensor.shape, tensor.dtype, tensor.requires_grad, tensor.is_leaf))
        hooks = {
            "_backward_hooks": tensor._backward_hooks,
            "_post_hooks": getattr(tensor, "_post_accumulate_grad_hooks", None),
        }
        self._attributes({**vars(tensor), **hooks})

    def _array(self, array: Any) -> None:
        if array.dtype.hasobject or array.nbytes > LARGEST_ARRAY_BYTES:
            raise _UnstableError("an array of objects, or a large one")
        self._text(array.dtype.str, str(array.shape), hashlib.sha256(array.tobytes()).hexdigest())

    def _class(self, cls: type) -> None:
        """Add a class: a library's by name, version and file; any other by all that is in it."""
        module = str(cls.__module__)
        self._text("class", module, cls.__qualname__)
        if self._is_library(module) and _named(module, cls.__qualname__) is cls:
            self._library(module)
            for base in cls.__mro__:
                self._replaced(vars(base), base.__module__)
            return
        self._items("bases", (*cls.__bases__, type(cls)))
        for name, item in vars(cls).items():
            if name not in _CLASS_NOISE:
                self._text(name)
                self.add(item)

    def _library(self, name: str) -> None:
        """Add a library's module: version, file, its switches, and functions replaced in it."""
        if name in self._described:
            return
        self._described.add(name)
        module = sys.modules[name]
        self._text(_package_version(name))
        if file := _file_of(module):
            self._file(file)
        self._replaced(vars(module), name)
        for known, item in vars(module).items():
            if type(item) in _PLAIN and not known.startswith("__"):
                self.add((known, item))

    def _replaced(self, namespace: Mapping[str, Any], module: str) -> None:
        """Add the functions in a library's namespace that come from elsewhere: someone's patches.

        Not `smart_apply`, which transformers adds to torch's modules when it first needs it.
        """
        for name, item in namespace.items():
            if isinstance(item, FunctionType) and name != "smart_apply":
                inner = inspect.unwrap(item)
                home = str(getattr(inner, "__globals__", {}).get("__name__"))
                if home.partition(".")[0] == module.partition(".")[0]:
                    continue
                self._text(name)
                if self._is_library(home):
                    self._text(home, inner.__qualname__, _package_version(home))
                else:
                    self.add(inner)

    def _function(self, function: Any) -> None:
        while getattr(function, "hooked", False):  # torch wraps an optimizer's step on first use
            function = function.__wrapped__
        self.add((function.__code__, function.__defaults__, function.__kwdefaults__))
        self._items("closure", [_content(cell) for cell in function.__closure__ or ()])
        self._attributes({k: v for k, v in vars(function).items() if k != "__wrapped__"})
        home = str(function.__globals__.get("__name__"))
        if self._is_library(home):
            self._text("of", home, _package_version(home))
        else:
            self._references(function)

    def _references(self, function: FunctionType) -> None:
        """Queue what a user's function names: its globals, modules' attributes, imports."""
        names, constants, imports = _mentions(function.__code__)
        visited: set[int] = set()
        for name in sorted(names & function.__globals__.keys()):
            self._text(name)
            self._refer(function.__globals__[name], names, visited)
        package = function.__globals__.get("__package__") or ""
        for name, level, parts in imports:
            full = importlib.util.resolve_name("." * level + name, package)
            module = sys.modules.get(full)
            self._text("import", full)
            if module is not None:
                self._refer(module, names | set(parts), visited)
                if self._is_library(full) or set(parts) <= vars(module).keys():
                    continue
            elif not level and (found := _installed_version(full.partition(".")[0])) is not None:
                self._text(found)
                continue
            raise _UnstableError(f"{full} is the user's own and not loaded yet")
        if names & {"environ", "getenv"}:
            self._items("environment", [os.environ.get(name) for name in sorted(constants)])

    def _refer(self, value: Any, names: set[str], visited: set[int]) -> None:
        if not isinstance(value, ModuleType):
            self._pending.append(value)
            return
        self.add(value)
        if id(value) in visited:
            return
        visited.add(id(value))
        library = self._is_library(value.__name__)
        for name in sorted(names & vars(value).keys()):
            item = vars(value)[name]
            self._text(name)
            if library and not isinstance(item, (*_PLAIN, FunctionType, type, ModuleType)):
                self._text(type(item).__qualname__)
            else:
                self._refer(item, names, visited)

    def _is_library(self, name: str) -> bool:
        """Say whether a module is the standard library's, installed, torch's or autobatch's."""
        if name not in self._libraries:
            file = _file_of(sys.modules.get(name))
            top = name.partition(".")[0]
            self._libraries[name] = (
                _is_installed(file)
                if file
                else top in sys.stdlib_module_names or top in ("torch", "autobatch")
            )
        return self._libraries[name]

    def _file(self, file: str) -> None:
        with open(file, "rb") as stream:
            status = os.stat(stream.fileno())
            if status.st_size > LARGEST_SOURCE_BYTES:
                self._text(str(status.st_size), str(status.st_mtime_ns))
            else:
                self._text(hashlib.sha256(stream.read()).hexdigest())

    def _items(self, kind: str, items: Any) -> None:
        self._text(kind, str(len(items)))
        for item in items:
            self.add(item)

    def _text(self, *texts: str) -> None:
        self._tokens += len(texts)
        if self._tokens > MOST_TOKENS:
            raise _UnstableError("too much to describe")
        for text in texts:
            encoded = text.encode("utf-8", "surrogatepass")
            self._hash.update(b"%d:%s" % (len(encoded), encoded))


def _switch(name: str) -> Any:
    """Return a setting of torch; of a table of global hooks, those in it, without their ids."""
    try:
        owner, _, last = name.rpartition(".")
        module = sys.modules.get(f"torch.{owner}")  # torch.optim hides its module of that name
        path = [last] if module else name.split(".")
        value = functools.reduce(getattr, path, module or torch)
        value = value() if callable(value) else value
    except (AttributeError, RuntimeError):
        return "unknown"  # an older torch, or the new way of allowing TF32 hides the old one
    return list(value.values()) if isinstance(value, dict) else value


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return NotImplemented  # not filled yet


def _rank(item: Any) -> str:
    """Return a text that orders the items of a set in the same way everywhere."""
    if type(item) in _ATOMS:
        return f"{type(item).__name__} {item!r}"
    if type(item) is tuple:
        return f"({', '.join(map(_rank, item))})"
    if isinstance(item, Enum):
        return f"{_rank(type(item))} {item.name}"
    if isinstance(item, (type, FunctionType)):
        return f"{item.__module__}.{item.__qualname__}"
    raise _UnstableError(f"a set of {type(item).__qualname__}")


def _numbered(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out empty tables of hooks, and number the hooks of others: ids are the process's."""
    tables = {
        name: table
        for name, table in attributes.items()
        if "_hooks" in name and (table is None or isinstance(table, dict))
    }
    if not tables:
        return dict(attributes)
    ids = sorted({key for table in tables.values() for key in table or ()})
    numbered = {
        name: {ids.index(key): hook for key, hook in table.items()}
        for name, table in tables.items()
        if table
    }
    return {name: item for name, item in attributes.items() if name not in tables} | numbered


def _named(module: str, qualname: str) -> Any:
    """Return what a loaded module holds under a name, without waking anything lazy."""
    found: Any = sys.modules.get(module)
    for part in qualname.split("."):
        found = getattr(found, "__dict__", {}).get(part)
    return found


def _slots_of(kind: type) -> dict[str, Any]:
    return {
        f"{base.__qualname__}.{name}": member
        for base in kind.__mro__
        for name, member in vars(base).items()
        if isinstance(member, types.MemberDescriptorType)
    }


def _hides_state(kind: type, slots: int) -> bool:
    """Say whether objects of a class hold more than attributes, as those written in C do."""
    pointers = (kind.__dictoffset__ > 0) + (kind.__weakrefoffset__ > 0) + slots
    plain_bytes = object.__basicsize__ + pointers * struct.calcsize("P")
    return kind.__basicsize__ > plain_bytes or kind.__itemsize__ > 0


def _mentions(code: CodeType) -> tuple[set[str], set[str], list[tuple[str, int, tuple[str, ...]]]]:
    """Return the names and texts in a function's code, and its imports: name, level, parts."""
    names, constants, imports = set(code.co_names), set[str](), []
    if dis.opmap["IMPORT_NAME"] in code.co_code[::2]:
        steps = [step for step in dis.get_instructions(code) if step.opname != "EXTENDED_ARG"]
        for level, parts, step in zip(steps, steps[1:], steps[2:], strict=False):
            if step.opname == "IMPORT_NAME":
                imports.append((step.argval, level.argval, parts.argval or ()))
    for constant in code.co_consts:
        if isinstance(constant, str):
            constants.add(constant)
        elif isinstance(constant, CodeType):
            inner = _mentions(constant)
            names |= inner[0]
            constants |= inner[1]
            imports += inner[2]
    return names, constants, imports


def _installed_version(top: str) -> str | None:
    """Return the version of a package that is not loaded; None where it is the user's own."""
    if top in sys.stdlib_module_names:
        return ""
    spec = importlib.util.find_spec(top)
    if spec is None:
        return "absent"
    return _package_version(top) if spec.origin and _is_installed(spec.origin) else None


def _is_installed(file: str) -> bool:
    return file.startswith(_LIBRARY_ROOTS) or any(part in file for part in _LIBRARY_FOLDERS)


def _file_of(module: Any) -> str | None:
    """Return a loaded module's file, without waking lazy modules."""
    file = getattr(module, "__dict__", {}).get("__file__")
    return file if isinstance(file, str) and not file.startswith("<") else None


def _without_address(text: str) -> str:
    if " at 0x" in text:
        raise _UnstableError(text)
    return text


@functools.cache
def _package_version(module: str) -> str:
    top = module.partition(".")[0]
    if top in sys.stdlib_module_names or top == "__main__":
        return ""
    try:
        return importlib.metadata.version(top)
    except importlib.metadata.PackageNotFoundError:
        return str(getattr(sys.modules.get(top), "__dict__", {}).get("__version__"))


@functools.cache
def _own_source() -> str:
    """Return a hash of autobatch's own files: between releases its answers change too."""
    total = hashlib.sha256()
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        total.update(hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()
