"""Models and Workloads that a user's function makes.

Invariant: `sys.path` and `sys.argv` are afterwards as before; whatever the user's code raises
becomes one WorkloadError with the original chained.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from torch import nn

from autobatch.errors import SpecError, WorkloadError
from autobatch.support.patching import patched
from autobatch.support.wording import near, said_by
from autobatch.workload.spec.library import model_names
from autobatch.workload.workload import Workload

__all__ = ["load_function", "named_object"]

T = TypeVar("T")

PREFIXES = ("timm", "torchvision", "hf")

FORMS = "file.py:function, package.module:function, timm:NAME, torchvision:NAME or hf:TYPE"


def load_function(spec: str, **sizes: int) -> nn.Module | Workload:
    """Call the function file.py:function or package.module:function, and return what it makes.

    Args:
        spec: names the function.
        sizes: arguments that it is called with, such as seq=512; none as a rule.

    Raises:
        SpecError: there is no such file, module or function, it does not take these arguments, or
            it makes neither of the two.
        WorkloadError: the user's code raised; the original error is chained.
    """
    with _imported(spec) as named:
        made = _made_by(named, spec, sizes)
    if isinstance(made, (nn.Module, Workload)):
        return made
    raise SpecError(
        f"{spec} returned {type(made).__name__}: it must return a torch.nn.Module or an "
        "autobatch.Workload"
    )


def named_object(spec: str) -> Any:
    """Return what file.py:name or package.module:name names, without calling it.

    Raises:
        SpecError: there is no such file, module or name.
        WorkloadError: the user's code raised; the original error is chained.
    """
    with _imported(spec) as named:
        return named


@contextmanager
def _imported(spec: str) -> Iterator[Any]:
    """Import what a SPEC names; in the block it is as in a script, without arguments."""
    source, _, name = spec.rpartition(":")
    if not source or not name:
        raise SpecError(f"{spec!r} is no SPEC{_meant(source or name)}: write {FORMS}")
    is_file = source.endswith(".py") or Path(source).is_file()
    folder = Path(source).resolve().parent if is_file else Path.cwd()
    # the command's own words are none for a file that reads its own
    with patched(sys, path=[str(folder), *sys.path], argv=[source]):
        module = _import_file(source) if is_file else _import_module(source)
        if not hasattr(module, name):
            plain, _, options = name.partition("?")
            if options and hasattr(module, plain):
                raise SpecError(
                    f"options after ? are for {', '.join(PREFIXES)}: write {source}:{plain}, and "
                    f"let its defaults, or --vary, say {options}"
                )
            known = [key for key in vars(module) if not key.startswith("_")]
            raise SpecError(f"{source} has no function {name!r}{near(name, known)}")
        yield getattr(module, name)


def _meant(spec: str) -> str:
    """Return " (did you mean ...?)" where a SPEC is a file, or a library's name, alone."""
    if Path(spec).is_file():
        nodes = ast.parse(Path(spec).read_text(errors="replace")).body
        defined = [node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
        meant = [f"{spec}:{name}" for name in defined if not name.startswith("_")]
    else:
        meant = [f"{prefix}:{spec}" for prefix, names in model_names() if spec.lower() in names]
    return f" (did you mean {' or '.join(meant[:4])}?)" if meant else ""


def _prefix_or_file(source: str) -> str:
    """Return " (did you mean ...?)" where a module's name is like a library's prefix or file's."""
    path = f"{source.replace('.', '/')}.py"
    if Path(path).is_file():
        return f" (did you mean {path}?)"
    return near(source.lower(), PREFIXES)


def _import_file(source: str) -> ModuleType:
    path = Path(source).resolve()
    if path.is_dir():
        raise SpecError(f"{source} is a folder: write file.py:function")
    if not path.is_file():
        siblings = [str(Path(source).with_name(other.name)) for other in path.parent.glob("*.py")]
        raise SpecError(f"no such file: {source}{near(source, siblings)}")
    # Not the stem alone, or a file named torch.py would replace the real one.
    name = f"autobatch_spec_{path.stem}"
    found = importlib.util.spec_from_file_location(name, path)
    if found is None or found.loader is None:
        raise SpecError(f"{source} is not a Python file: write file.py:function")
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module
    try:
        _run_user_code(source, partial(found.loader.exec_module, module))
    except WorkloadError:
        del sys.modules[name]
        raise
    return module


def _import_module(source: str) -> ModuleType:
    try:
        return _run_user_code(source, lambda: importlib.import_module(source))
    except WorkloadError as error:
        cause = error.__cause__
        missing = cause.name if isinstance(cause, ModuleNotFoundError) else None
        if missing and (source == missing or source.startswith(f"{missing}.")):
            meant = _prefix_or_file(source)
            raise SpecError(f"no module named {missing!r}{meant}: write {FORMS}") from None
        raise


def _made_by(maker: Any, spec: str, sizes: Mapping[str, int]) -> Any:
    """Call a user's function; a model or Workload kept in a variable is taken as it is."""
    given = ", ".join(f"{name}={size}" for name, size in sizes.items())
    if isinstance(maker, (nn.Module, Workload)):
        if sizes:
            raise SpecError(
                f"{spec} is a {type(maker).__name__}: name a function that takes {given}"
            )
        return maker
    if not callable(maker):
        raise SpecError(f"{spec} is a {type(maker).__name__}: name a function that returns a model")
    try:
        inspect.signature(maker).bind(**sizes)
    except TypeError as error:
        raise SpecError(
            f"{spec} cannot be called with {given} alone ({error}): let it take that, with "
            "defaults for all other arguments"
            if sizes
            else f"{spec} needs arguments ({error}): name a function that can be called without "
            "any, or give whole numbers by --vary, as in --vary width=64"
        ) from None
    return _run_user_code(spec, partial(maker, **sizes))


def _run_user_code(what: str, run: Callable[[], T]) -> T:
    try:
        return run()
    except (Exception, SystemExit) as error:
        failed = "failed: " if isinstance(error, SystemExit) else "raised "
        raise WorkloadError(f"{what} {failed}{said_by(error)}") from error
