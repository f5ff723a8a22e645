"""What the stack of an allocation tells: the user's line, the operator, and the part of a step.

Invariant: only what a frame proves is said; a stack that proves nothing has the part None.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from autobatch.memory.snapshot import Frame, Stack
from autobatch.support.owners import OURS

__all__ = ["Origin", "Part", "is_of_library", "is_users", "line_as_text", "origin_of"]

Part = Literal["forward", "backward", "optimizer", "outside"]
"""The part of a training step: `outside` is Python code that is in none of the others."""

_LIBRARY = re.compile(
    r"/(site|dist)-packages/|/lib(64)?/python\d|^<|torchinductor|/inductor/|/torch/_|"
    r"/torch/(nn|optim|utils|autograd|distributed|cuda|amp|fx|functional|profiler|random)\b",
    re.IGNORECASE,
)
_NOTEBOOK = re.compile(r"^<ipython-input|/ipykernel_\d+/|^<stdin>$|^<string>$")
_INDUCTOR_FILE = re.compile(r"/c[a-z0-9]{50,51}\.py$")
_WORKSPACE = re.compile(r"[Ww]orkspace")
_OPERATOR = re.compile(r"^at::_ops::(\w+)::(?:call|redispatch)\b")
_NODE = re.compile(r"^(?:torch::autograd::(?:generated::)?)(\w+?)(?:_apply_functional\b|::apply\b)")
_LONGEST = 60


@dataclass(frozen=True, slots=True)
class Origin:
    """Where an allocation came from.

    Attributes:
        part: of a training step; None where the stack does not tell.
        recomputes: whether a forward pass runs inside of the backward pass, as checkpoints do.
        purpose: what it is for, where a frame says so.
        where: the user's line, as `folder/file.py:12 function`; empty where none is in the stack.
        operator: the outermost operator or the node of the backward pass; else PyTorch's innermost
            line of Python; empty where neither is known.
    """

    part: Part | None
    recomputes: bool
    purpose: Purpose | None
    where: str
    operator: str


Purpose = Literal[
    "workspace", "parameters", "optimizer state", "gradients", "communication", "zeroing"
]


def origin_of(stack: Stack) -> Origin:
    """Read a stack.

    >>> step = Frame("step", "/venv/site-packages/torch/optim/sgd.py", 80)
    >>> origin_of((step, Frame("train", "/home/me/run/train.py", 12))).where
    'run/train.py:12 train'
    """
    innermost: Part | None = None
    in_backward = calls_module = recomputes = False
    purpose: Purpose | None = None
    python = False
    for frame in stack:
        is_python = _is_python(frame)
        python |= is_python
        part, meant = _meaning(frame) if is_python else _native_meaning(frame)
        if meant == "communication" and innermost is not None:
            meant = None  # a model inside of a wrapper
        if part is not None:
            innermost = innermost or part
            in_backward |= part == "backward"
            # Compiled backward passes name lines of the forward pass, without calls of modules.
            calls_module |= frame.name == "_call_impl" and not in_backward
            recomputes |= part == "backward" and (calls_module or _is_checkpoint(frame))
        purpose = purpose or meant
    outer: Part | None = "backward" if in_backward else innermost
    if outer is None and python:
        outer = "outside"
    recomputes &= innermost == "forward"
    return Origin(outer, recomputes, purpose, _users_line(stack), _operator(stack))


def _is_python(frame: Frame) -> bool:
    """Tell Python's frames from those of C++, whose files are `??`, empty or of C++."""
    return frame.filename.endswith(".py") or frame.filename.startswith("<")


def _is_checkpoint(frame: Frame) -> bool:
    return _path(frame).endswith("/torch/utils/checkpoint.py")


def _path(frame: Frame) -> str:
    return frame.filename.replace("\\", "/")


def _meaning(frame: Frame) -> tuple[Part | None, Purpose | None]:
    path, name = _path(frame), frame.name
    if "/optim/" in path or path.endswith("/optimizer.py"):
        if name == "zero_grad":
            return None, "zeroing"
        if name in ("_init_group", "init_state", "_init_state", "load_state_dict"):
            return "optimizer", "optimizer state"
        return ("optimizer", None) if "/torch/optim/" in path or name == "step" else (None, None)
    if name == "backward" or path.endswith("/torch/autograd/graph.py"):
        return "backward", None
    if _is_checkpoint(frame):
        recomputes = name in ("unpack_hook", "recompute_fn")
        return ("backward", None) if recomputes else (None, None)
    if path.endswith("/torch/nn/modules/module.py"):
        if name in ("_apply", "convert", "_load_from_state_dict"):
            return None, "parameters"
        if name == "zero_grad":
            return None, "zeroing"
        return ("forward", None) if name in ("_call_impl", "_wrapped_call_impl") else (None, None)
    if name in ("from_pretrained", "reset_parameters") or (
        name == "__init__" and "/torch/nn/modules/" in path
    ):
        return None, "parameters"
    if "/torch/distributed/" in path or path.endswith("/torch/nn/parallel/distributed.py"):
        return None, "communication"
    return ("forward", None) if name == "forward" else (None, None)


def _native_meaning(frame: Frame) -> tuple[Part | None, Purpose | None]:
    name = frame.name.partition("(")[0] if not frame.name.startswith("(") else frame.name
    if "AccumulateGrad" in name:
        return "backward", "gradients"
    if "torch::autograd::Engine::" in frame.name or "CompiledAutograd" in name:
        return "backward", None
    if "c10d::" in name:
        return None, "communication"
    return None, "workspace" if _WORKSPACE.search(name) else None


def _users_line(stack: Stack) -> str:
    for frame in stack:
        if not _is_python(frame):
            continue
        if not is_of_library(frame.filename):
            return line_as_text(frame.filename, frame.line, frame.name)
    return ""


def is_of_library(filename: str) -> bool:
    """Whether a file is not the user's: Python's own, of a package, or compiled."""
    path = filename.replace("\\", "/")
    is_library = _LIBRARY.search(path) or _INDUCTOR_FILE.search(path)
    return bool(is_library) and not _NOTEBOOK.search(path)


def is_users(filename: str) -> bool:
    """Whether a file of this process is the user's, and so neither a library's nor autobatch's."""
    return not (filename.startswith(OURS) or is_of_library(filename))


def line_as_text(filename: str, line: int, function: str) -> str:
    """Name a line of the user's.

    >>> line_as_text("/home/me/run/train.py", 12, "loss")
    'run/train.py:12 loss'
    """
    return f"{'/'.join(filename.replace(chr(92), '/').split('/')[-2:])}:{line} {function}"


def _operator(stack: Stack) -> str:
    """Return the outermost operator that the innermost line of Python, or the engine, called."""
    found = node = ""
    for frame in stack:
        if _is_python(frame):
            break
        operator = _OPERATOR.match(frame.name)
        if operator:
            found = operator[1]
        elif match := _NODE.match(frame.name):
            node = node or match[1]
    if node:
        return f"{node}: {found}" if found else node
    return found or _library_line(stack)


def _library_line(stack: Stack) -> str:
    """Return PyTorch's innermost line of Python that is not the user's."""
    for frame in stack:
        if not _is_python(frame):
            continue
        path = _path(frame)
        if "/torch/" in path and not path.endswith("/nn/modules/module.py"):
            return f"torch/{path.rpartition('/torch/')[2]}:{frame.line} {frame.name}"[-_LONGEST:]
        if _INDUCTOR_FILE.search(path):
            return "a compiled graph"
        return ""
    return ""
