"""What objects are, as one hash that any process would give.

Invariant: two values share a digest only if nothing that memory depends on tells them apart. An
object is its kind and a list of parts, which are objects again: its class and its attributes, or
what `copy` and `pickle` would make it from. What a library defines is its name, version and file;
what the user defines is its code and all that the code names. What has no parts to show is an
error, not a guess. No tensor's values are read; nothing is pickled.
"""

from __future__ import annotations

import copyreg
import dis
import functools
import hashlib
import importlib.metadata
import importlib.util
import operator
import os
import platform
import random
import re
import sys
import sysconfig
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from pickle import PickleBuffer
from types import CellType, CodeType, FunctionType, MethodType, ModuleType, NoneType
from typing import Any

import torch
from torch import Tensor, nn

from autobatch import _version

__all__ = ["UndescribableError", "digest", "surroundings"]

MOST_BYTES = 2**24
"""An answer costs seconds; so does a description of this length."""

_PLAIN = (bool, int, float, str, NoneType)
_ATOMS = frozenset({*_PLAIN, complex, bytes})  # written as Python writes them


class UndescribableError(Exception):
    """Another process might describe the value in another way."""


def digest(value: object) -> str:
    """Return a SHA-256 in hexadecimal of any object, its parts, their parts and so on.

    Every object is written as its kind, the number of its parts and then the parts, so that no two
    structures give the same bytes. One that is met again is named by the number of its first
    visit: ties between tensors are kept, and cycles end.

    Raises:
        UndescribableError: no other process would describe it the same way.
        Exception: whatever else the objects raise when they are looked at.

    >>> digest([1, 2]) == digest([1, 2]) != digest([1, True])
    True
    """
    total, left_bytes = hashlib.sha256(), MOST_BYTES
    visits: dict[int, tuple[int, object]] = {}  # holds the objects, so that no id is used again
    todo = [value]
    while todo:
        item = todo.pop()
        kind, parts = type(item).__name__, list[object]()
        if type(item) in _ATOMS:
            text = repr(item)
        elif type(item) is not tuple and id(item) in visits:
            kind, text = "again", str(visits[id(item)][0])
        else:
            visits[id(item)] = (len(visits), item)
            kind, parts = _parts(item)
            text = str(len(parts))
        written = f"{len(kind)}:{kind}{len(text)}:{text}".encode()
        left_bytes -= len(written)
        if left_bytes < 0:
            raise UndescribableError("too much to describe")
        total.update(written)
        todo.extend(reversed(parts))
    return total.hexdigest()


def surroundings() -> dict[str, object]:
    """Return what a plan depends on beside the question: versions, settings, the user's files."""
    own = sorted(Path(__file__).parent.rglob("*.py"))
    return {
        "versions": (_version.__version__, torch.__version__, platform.python_version_tuple()[:2]),
        "autobatch": [_file_hash(str(file)) for file in own],  # its answers change between releases
        "environment": {name: os.environ.get(name) for name in _ENVIRONMENT},
        "switches": {name: _switch(name) for name in _SWITCHES},
        "sources": {
            name: _file_hash(file)
            for name in sorted(sys.modules)
            if (file := _file_of(name)) and not _is_library(name)
        },
    }


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
_STANDARD = sys.stdlib_module_names
_LIBRARY_FOLDERS = tuple(
    os.path.join(os.path.abspath(folder), "")
    for folder in (
        *map(sysconfig.get_path, ("stdlib", "platstdlib", "purelib", "platlib")),
        *map(os.path.dirname, (torch.__file__, __file__)),
    )
)
_INSTALLED = re.compile(r"[\\/](site|dist)-packages[\\/]")
_HOOKS = re.compile("_(forward|backward|(load_)?state_dict|optimizer|post_accumulate_grad)_.*hooks")
# What belongs to the process, changes with use, or is said elsewhere; the last ones are notes of
# transformers and of Dynamo.
_NOISE = frozenset(
    """__dict__ __weakref__ __slotnames__ __doc__ __annotations__ __annotate__ __annotate_func__
    __annotations_cache__ __firstlineno__ __static_attributes__ _abc_impl
    _is_hf_initialized _original_object_hash _torchdynamo_wrapper_id __dynamo_disable""".split()
)


def _switch(name: str) -> object:
    """Return a setting of torch; of a table of global hooks, those in it, without their ids."""
    owner, _, last = name.rpartition(".")
    module = sys.modules.get(f"torch.{owner}")  # torch.optim hides its module of that name
    try:
        value: Any = operator.attrgetter(last if module else name)(module or torch)
        value = value() if callable(value) else value
    except (AttributeError, RuntimeError):
        return "unknown"  # an older torch, or the new way of allowing TF32 hides the old one
    return list(value.values()) if isinstance(value, dict) else value


def _parts(value: Any) -> tuple[str, list[object]]:
    """Return an object's kind and its parts."""
    if rule := _RULES.get(type(value)):
        return type(value).__name__, list(rule(value))
    base = next(base for base in _RULES_OF_SUBCLASSES if isinstance(value, base))
    return base.__name__, list(_RULES_OF_SUBCLASSES[base](value))


def _object(value: Any) -> Iterable[object]:
    """Return what pickle would make an object from, and all of its attributes.

    An error for what holds more than attributes and does not say how it is made: a lock, a
    generator, an object written in C.
    """
    kind: Any = type(value)
    attributes = getattr(value, "__dict__", {})
    if isinstance(value, nn.Module) and kind.__reduce__ is object.__reduce__:
        return (kind, _settled({k: v for k, v in attributes.items() if k != "training"}))
    reduce = copyreg.dispatch_table.get(kind)
    reduction: Any = reduce(value) if reduce else value.__reduce_ex__(5)
    if isinstance(reduction, str):  # a global, known by its name
        module = str(getattr(value, "__module__", None))
        return (kind.__name__, module, reduction, _version_of(module))
    make, arguments, state, *items = (*reduction, None, None, None)[:5]
    parts = (make, arguments, *(list(item) for item in items if item is not None))
    if make is not copyreg.__newobj__ and _library_of(kind):  # type: ignore[attr-defined]
        return (*parts, state)
    # A state of its own may leave attributes out: an optimizer's leaves out its hooks.
    plain = getattr(kind, "__getstate__", None) is getattr(object, "__getstate__", None)
    hidden = None if plain and isinstance(state, dict) else state
    return (*parts, hidden, _settled(attributes))


def _settled(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Return attributes without noise; torch's hooks are numbered anew, not as the process did."""
    kept = {name: item for name, item in attributes.items() if name not in _NOISE}
    tables = {
        name: kept.pop(name) or {}
        for name in attributes
        if _HOOKS.match(name) and isinstance(kept.get(name, 0), (dict, NoneType))
    }
    ids = sorted(set().union(*tables.values()))
    return kept | {n: {ids.index(i): t[i] for i in t} for n, t in tables.items() if t}


def _tensor(tensor: Tensor) -> Iterable[object]:
    """Return all of a tensor but its values and device; sparse and lazy ones raise here."""
    if hasattr(tensor, "__tensor_flatten__"):
        raise UndescribableError("a tensor made of others")
    names = ("_backward_hooks", "_post_accumulate_grad_hooks")
    hooks = {name: getattr(tensor, name, None) for name in names}
    memory = (tensor.untyped_storage(), tensor.storage_offset(), tensor.stride())
    autograd = (tensor.requires_grad, tensor.is_leaf, _settled(vars(tensor) | hooks))
    return (type(tensor), tensor.dtype, tuple(tensor.shape), memory, autograd)


def _set(items: set[Any] | frozenset[Any]) -> Iterable[object]:
    if any(isinstance(item, Tensor) for item in items):
        raise UndescribableError("only their values, which are not read, give tensors an order")
    texts = {repr(item): item for item in items}
    if len(texts) < len(items) or any(" at 0x" in text for text in texts):
        raise UndescribableError("a set without an order that every process would find")
    return (texts[text] for text in sorted(texts))


def _buffer(buffer: PickleBuffer) -> Iterable[object]:
    memory = buffer.raw()
    if memory.nbytes > MOST_BYTES:
        raise UndescribableError("a large array")
    return (hashlib.sha256(memory).hexdigest(),)


def _class(cls: type) -> Iterable[object]:
    """Return a library's class by name, with what was replaced in it; any other by its contents."""
    name = (cls.__module__, cls.__qualname__)
    if module := _library_of(cls):
        return (name, module, *(_replaced(vars(base), base.__module__) for base in cls.__mro__))
    contents = {key: item for key, item in vars(cls).items() if key not in _NOISE}
    return (name, cls.__bases__, type(cls), contents)


def _module(module: ModuleType) -> Iterable[object]:
    """Return a library's version, file, settings, and what was replaced in it.

    The user's files are among the surroundings; of values in them, those that code names count.
    """
    name = module.__name__
    if not _is_library(name):
        return (name,)
    file, contents, settings = _file_of(name), vars(module), {}
    if _top(name) not in _STANDARD:  # `logging` keeps the time of its start
        plain = {key for key, item in contents.items() if type(item) in _PLAIN and key[:2] != "__"}
        settings = {key: contents[key] for key in sorted(plain)}
    found = (file and _file_hash(file), settings, _replaced(contents, name))
    return (name, _version_of(name), *found)


def _replaced(namespace: Mapping[str, Any], module: str) -> dict[str, object]:
    """Return the functions in a library's namespace that come from elsewhere: someone's patches."""
    found: dict[str, object] = {}
    for name, item in namespace.items():
        if isinstance(item, FunctionType):
            home = _home_of(_unhooked(item))
            if _top(home) != _top(module):
                known = (home, item.__qualname__, _version_of(home))
                found[name] = known if _is_library(home) else item
    return found


def _function(function: FunctionType) -> Iterable[object]:
    """Return a library's function by name; any other by its code and all that the code names."""
    if module := _library_of(function):
        return (function.__qualname__, module)
    function = _unhooked(function)
    home = _home_of(function)
    made_of = (function.__code__, function.__defaults__, function.__kwdefaults__)
    named = sys.modules.get(home) if _is_library(home) else dict(_named(function))
    return (*made_of, function.__closure__, _settled(vars(function)), named)


def _unhooked(function: Any) -> Any:
    while getattr(function, "hooked", False):  # torch wraps an optimizer's step on first use
        function = function.__wrapped__
    return function


def _named(function: FunctionType) -> Iterator[tuple[str, object]]:
    """Yield the globals, attributes of modules, imports and settings that a user's code names."""
    codes = [function.__code__]
    for code in codes:  # grows on the way
        codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    names = {name for code in codes for name in code.co_names}
    if names & {"environ", "getenv"}:
        texts = {text for code in codes for text in code.co_consts if isinstance(text, str)}
        yield "environment", {text: os.environ.get(text) for text in sorted(texts)}
    package = str(function.__globals__.get("__package__") or "")
    imports = dict(chain.from_iterable(_imports(code, package) for code in codes))
    yield from (("import " + name, module) for name, module in imports.items())
    modules = {"": function.__globals__}
    modules |= {n: vars(m) for n, m in imports.items() if isinstance(m, ModuleType)}
    todo = list(modules)
    while todo:
        owner = todo.pop()
        library = bool(owner) and _is_library(owner)
        for name in sorted(names & modules[owner].keys()):
            item = modules[owner][name]
            if isinstance(item, ModuleType) and item.__name__ not in modules:
                modules[item.__name__] = vars(item)
                todo.append(item.__name__)
            # A library's own state is its affair: caches, pools, generators.
            if not library or isinstance(item, (*_PLAIN, FunctionType, type, ModuleType)):
                yield f"{owner}:{name}", item


def _imports(code: CodeType, package: str) -> Iterator[tuple[str, object]]:
    """Yield the modules that a function imports, by name; of those not loaded, the version.

    Raises:
        UndescribableError: one is the user's own and not loaded yet, so that it may still change.
    """
    if dis.opmap["IMPORT_NAME"] not in code.co_code[::2]:
        return  # disassembling is slow
    steps = [step for step in dis.get_instructions(code) if step.opname != "EXTENDED_ARG"]
    for level, wanted, step in zip(steps, steps[1:], steps[2:], strict=False):
        if step.opname == "IMPORT_NAME":
            name = importlib.util.resolve_name("." * level.argval + step.argval, package)
            module = sys.modules.get(name)
            here = module is not None and set(wanted.argval or ()) <= vars(module).keys()
            if not here and not _is_library(name):
                raise UndescribableError(f"{name} is not loaded yet")
            yield name, module or _version_of(name)


def _library_of(value: type | FunctionType) -> ModuleType | None:
    """Return the library's module in which a class or function stands under its own name."""
    home = str(value.__module__ if isinstance(value, type) else _home_of(value))
    module = sys.modules.get(home)
    found: Any = module
    for part in value.__qualname__.split("."):
        found = getattr(found, "__dict__", {}).get(part)  # wakes nothing lazy
    return module if found is value and _is_library(home) else None


def _home_of(function: FunctionType) -> str:
    return str(function.__globals__.get("__name__"))  # decorators give a false `__module__`


def _is_library(module: str) -> bool:
    """Say whether a module is the standard library's, torch's, autobatch's or installed."""
    file = _file_of(module) or _file_of(_top(module))
    if file is None:
        return _top(module) in _STANDARD
    return file.startswith(_LIBRARY_FOLDERS) or bool(_INSTALLED.search(file))


def _file_of(name: str) -> str | None:
    """Return the file of a module, loaded or not, without waking lazy ones."""
    if name in sys.modules:
        file = getattr(sys.modules[name], "__dict__", {}).get("__file__")
    else:
        spec = None if "." in name else importlib.util.find_spec(name)
        file = spec.origin if spec and spec.has_location else None
    return file if isinstance(file, str) and not file.startswith("<") else None


@functools.cache
def _version_of(module: str) -> str:
    if _top(module) in _STANDARD:
        return ""
    try:
        return importlib.metadata.version(_top(module))
    except importlib.metadata.PackageNotFoundError:
        return str(getattr(sys.modules.get(_top(module)), "__dict__", {}).get("__version__"))


def _top(module: str) -> str:
    return module.partition(".")[0]


def _file_hash(file: str) -> str:
    status = os.stat(file)
    if status.st_size > MOST_BYTES:
        return f"{status.st_size} {status.st_mtime_ns}"
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


_CODE = operator.attrgetter(
    *"co_name co_code co_consts co_names co_varnames co_freevars co_cellvars co_flags".split(),
    *"co_argcount co_posonlyargcount co_kwonlyargcount".split(),
    *(["co_exceptiontable"] if sys.version_info >= (3, 11) else []),
)
# The parts of what pickle does not take, or takes by a name or a state that says too little or too
# much. Subclasses are objects with attributes: see `_object`.
_RULES: dict[type, Callable[[Any], Iterable[object]]] = {
    tuple: tuple,
    list: list,
    dict: lambda table: chain.from_iterable(table.items()),
    **dict.fromkeys([set, frozenset], _set),
    types.MappingProxyType: lambda proxy: (dict(proxy),),
    PickleBuffer: _buffer,
    FunctionType: _function,
    CodeType: _CODE,
    CellType: lambda cell: (cell.cell_contents,),
    MethodType: lambda method: (method.__func__, method.__self__),
    **dict.fromkeys([staticmethod, classmethod], lambda method: (method.__func__,)),
    property: lambda made: (made.fget, made.fset, made.fdel),
    functools.cached_property: lambda made: (made.func,),
    type(functools.cache(len)): lambda cached: (cached.__wrapped__,),
    weakref.ref: lambda reference: (reference(),),
    # Random states do not count, and of memory only which tensors share it.
    **dict.fromkeys([random.Random, torch.Generator, torch.UntypedStorage], lambda _: ()),
    torch.device: lambda device: ("cpu" if device.type == "meta" else device.type,),
    torch._ops.OpOverload: lambda operation: (str(operation),),
}
_RULES_OF_SUBCLASSES: dict[type, Callable[[Any], Iterable[object]]] = {
    type: _class,
    ModuleType: _module,
    Tensor: _tensor,
    object: _object,
}
