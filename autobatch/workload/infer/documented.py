"""Shapes of arguments as the docstring of `forward` gives them.

transformers documents tensors as "actions (`torch.LongTensor` of shape `(batch_size, act_dim)`)";
a size is a number, a name, or a sum or product of those.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Documented", "documented", "evaluated"]

_ARGUMENT = re.compile(r"^[ ]*(\w+) \(`([^`]*)`,? of shape `([^`]*)`", re.MULTILINE)
_DTYPES = {"Long": torch.int64, "Int": torch.int64, "Bool": torch.bool}
_OPERATORS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}


@dataclass(frozen=True, slots=True)
class Documented:
    """What a docstring says of a tensor.

    Attributes:
        dtype: None for floating-point numbers of any width.
        sizes: the sizes of its dimensions as they are written, the batch included. Where the
            docstring gives several shapes, one that begins with the batch.
    """

    dtype: torch.dtype | None
    sizes: tuple[str, ...]


def documented(forward: Callable[..., Any]) -> dict[str, Documented]:
    """Return the tensors whose shape the docstring of a function gives, by name.

    >>> def forward(self, steps):
    ...     '''steps (`torch.LongTensor` of shape `(batch_size, length + 1)`): when.'''
    >>> documented(forward)["steps"]
    Documented(dtype=torch.int64, sizes=('batch_size', 'length + 1'))
    """
    found = {}
    for name, kind, shape in _ARGUMENT.findall(forward.__doc__ or ""):
        dtype = next((dtype for word, dtype in _DTYPES.items() if f"{word}Tensor" in kind), None)
        ways = [_sizes(way) for way in re.split(r"\s+or\s+", shape)]
        plain = (way for way in ways if way[:1] == ("batch_size",))
        found[name] = Documented(dtype, next(plain, ways[0]))
    return found


def _sizes(shape: str) -> tuple[str, ...]:
    is_closed = shape[:1] + shape[-1:] in ("()", "[]")
    parts = (shape[1:-1] if is_closed else shape).split(",")
    return tuple(part.strip() for part in parts if part.strip())


def evaluated(size: str, value_of: Callable[[str], Any]) -> int | None:
    """Return a documented size as a number; None where a name in it is unknown.

    Args:
        size: such as "2 * sequence_length".
        value_of: given a name, or an attribute of `config`, returns its value or None.

    >>> evaluated("length + 2 * len(config.layers)", {"length": 5, "layers": [3, 4]}.get)
    9
    """
    try:
        number: int = _number(ast.parse(size, mode="eval").body, value_of)
    except (SyntaxError, LookupError, TypeError):
        return None
    return number


def _number(node: ast.expr, value_of: Callable[[str], Any]) -> Any:
    match node:
        case ast.Constant(int(value)):
            return value
        case ast.Name(name) | ast.Attribute(ast.Name("config"), name):
            value = value_of(name)
            if value is None:
                raise LookupError(name)
            return value
        case ast.BinOp(left, operation, right):
            combine = _OPERATORS[type(operation)]
            return combine(_number(left, value_of), _number(right, value_of))
        case ast.Call(ast.Name("len"), [values]):
            return len(_number(values, value_of))
    raise LookupError(ast.dump(node))
