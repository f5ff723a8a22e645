"""Gradient hooks on parameters: whether they may do something else to parts than to the whole.

Invariant: no hook is called here. Those of libraries are taken to be made for accumulation; those
of the user's are told unless their code shows nothing but products, such as a scale or a mask.
"""

from __future__ import annotations

import builtins
import contextlib
import dis
from collections.abc import Iterable, Iterator
from functools import partial
from types import FunctionType, ModuleType
from typing import Any

from torch import Tensor, nn

__all__ = ["note_on_hooks"]

_LIBRARIES = frozenset(
    "accelerate apex autobatch bitsandbytes clearml comet_ml deepspeed fairscale lightning "
    "lightning_fabric megatron neptune opacus peft pytorch_lightning timm torch torchao torchtitan "
    "transformer_engine transformers trl unsloth wandb".split()
)

_PRODUCTS = frozenset({"*", "*=", "/", "/=", "@", "@=", "[]"})
_OLD_PRODUCTS = ("MULTIPLY", "TRUE_DIVIDE", "MATRIX_MULTIPLY", "SUBSCR", "SLICE")  # Python 3.10

_LINEAR = frozenset(
    "clone contiguous cpu cuda detach div expand expand_as float half matmul mul neg reshape to "
    "type_as unsqueeze view view_as zeros_like".split()
)
"""Methods that a product may call."""


def note_on_hooks(parameters: Iterable[Tensor]) -> str | None:
    """Return a warning of hooks that windows of several micro-batches may change, or None."""
    listed = list(parameters)
    names = [name for name in map(_told, listed) if name is not None]
    if not names:
        return None
    have, it = ("have", "they see") if len(names) > 1 else ("has", "it sees")
    hooks = "gradient hooks" if len(names) > 1 else "a gradient hook"
    return (
        f"{len(names):,} of {len(listed):,} parameters {have} {hooks} of yours ({names[0]}): with "
        f"several micro-batches {it} parts of the gradient, which changes what clipping or adding "
        "something does; change the gradients between `for batch in window` and window.step() "
        "instead, or see by autobatch.check_equivalence that it is no matter"
    )


def _told(parameter: Tensor) -> str | None:
    """Return the name of a hook of a parameter's that has to be told."""
    ours = (hook for hook in _hooks(parameter._backward_hooks) if not _multiplies(hook))
    # these see the sum of the parts by now, so that even a scale comes out as another one
    after = _hooks(getattr(parameter, "_post_accumulate_grad_hooks", None))
    found = next((hook for some in (ours, after) for hook in some), None)
    return None if found is None else getattr(found, "__name__", type(found).__name__)


def _hooks(registered: Any) -> Iterator[Any]:
    """Yield the hooks that are no library's."""
    for hook in (registered or {}).values():
        given = hook
        while isinstance(given, partial):
            given = given.func
        module = getattr(given, "__module__", None) or type(given).__module__
        if module.partition(".")[0] not in _LIBRARIES:
            yield given


def _multiplies(hook: Any) -> bool:
    """Whether the code of a hook evidently does to a sum what it does to its parts."""
    function = getattr(hook, "__func__", hook)
    if not isinstance(function, FunctionType):
        return False
    instructions = list(dis.get_instructions(function.__code__))
    if not all(map(_is_linear, instructions)):
        return False
    if not any("CALL" in each.opname for each in instructions):
        return True
    found = list(_values_of(function, instructions))
    attributes = {each.argval for each in instructions if each.opname == "LOAD_ATTR"}
    # of a module, as in torch.clamp(gradient), what is called is loaded as any attribute is
    is_of_module = any(isinstance(value, ModuleType) for value in found)
    return not (any(map(_is_called, found)) or (is_of_module and attributes - _LINEAR))


def _is_linear(instruction: dis.Instruction) -> bool:
    name = instruction.opname
    if name.startswith(("COMPARE", "CONTAINS", "POP_JUMP", "MAKE_FUNCTION", "FOR_ITER")):
        return False
    if name == "BINARY_OP":
        return instruction.argrepr in _PRODUCTS
    if name.startswith(("BINARY_", "INPLACE_")):
        return name.endswith(_OLD_PRODUCTS)
    # Python 3.12 loads methods as other attributes, and writes that beside the name
    if name == "LOAD_METHOD" or (name == "LOAD_ATTR" and "NULL" in instruction.argrepr):
        return instruction.argval in _LINEAR
    return True


def _values_of(function: FunctionType, instructions: list[dis.Instruction]) -> Iterator[Any]:
    """Yield what the code of a function finds outside of its arguments."""
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    for each in instructions:
        if each.opname == "LOAD_GLOBAL":
            name = each.argval
            yield function.__globals__.get(name, getattr(builtins, name, None))
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # not set yet
            yield cell.cell_contents


def _is_called(value: Any) -> bool:
    return callable(value) and not isinstance(value, nn.Module)  # whose buffers hooks take
