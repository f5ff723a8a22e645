"""Frozen records to JSON and back, checked against their own type hints.

Invariant: `decode(type(r), encode(r)) == r`, and `decode` either returns a record whose every field
has its declared type, with finite numbers below 2**63 and text that a file can hold, or raises
`RecordError`.
"""

from __future__ import annotations

import json
import math
import re
import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import (
    Any,
    Literal,
    NoReturn,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

__all__ = ["RecordError", "decode", "dump_json", "encode", "parse_json", "parse_versioned"]

T = TypeVar("T")

_INTEGER_LIMIT = 2**63
_HALF = re.compile("[\ud800-\udfff]")
"""A surrogate, half of a character: JSON can spell it, and UTF-8 has no bytes for it."""
_SCALARS = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


class RecordError(ValueError):
    """A value that does not have the shape its record declares; says where and what."""


def encode(value: object) -> Any:
    """Turn records, mappings and tuples into what JSON holds: objects and lists."""
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: encode(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {key: encode(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [encode(item) for item in value]
    return value


def decode(kind: type[T], value: object) -> T:
    """Rebuild a record of type `kind` from parsed JSON.

    Raises:
        RecordError: a key is missing or unknown, or a value has another type than declared.
    """
    return cast(T, _decode(kind, value, ""))


def dump_json(value: object) -> str:
    """Render records as JSON text, two spaces deep.

    Raises:
        RecordError: a number is not finite.
    """
    try:
        return json.dumps(encode(value), indent=2, allow_nan=False) + "\n"
    except ValueError as error:
        raise RecordError(f"a number is not finite ({error})") from error


def parse_json(text: str) -> object:
    """Parse strict JSON: no NaN, no infinities, no runaway numbers or nesting.

    Raises:
        RecordError: the text is not such JSON.
    """
    try:
        return json.loads(
            text, parse_constant=_refuse, parse_float=_finite, parse_int=_bounded_integer
        )
    except RecursionError:
        raise RecordError("it is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise RecordError(f"it is not JSON ({error})") from error


def parse_versioned(text: str, schema_version: int, again: str = "it") -> dict[str, Any]:
    """Parse the JSON of an object with a `schema_version`, and return the object without it.

    Raises:
        RecordError: the text is no such JSON, or is of another version: make `again` again.
    """
    document = parse_json(text)
    if not isinstance(document, dict):
        raise RecordError("it does not hold a JSON object")
    version = document.pop("schema_version", None)
    if version != schema_version:
        raise RecordError(
            f"its schema_version is {str(version)[:20]!r}, and this autobatch reads "
            f"{schema_version}; make {again} again, or use the autobatch that wrote it"
        )
    return document


def _decode(kind: Any, value: object, where: str) -> object:
    if kind in _SCALARS:
        return _scalar(kind, value, where)
    if is_dataclass(kind):
        return _record(kind, value, where)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        if not isinstance(value, str) or value not in arguments:
            _fail(where, "one of " + ", ".join(arguments), value)
        return value
    if origin in (Union, types.UnionType):
        (inner,) = (argument for argument in arguments if argument is not types.NoneType)
        return None if value is None else _decode(inner, value, where)
    if origin is tuple:
        return _tuple(arguments, value, where)
    assert origin is not None and issubclass(origin, Mapping), f"{kind} has no JSON form"
    if not isinstance(value, dict):
        _fail(where, "an object", value)
    return {
        cast(str, _scalar(str, key, where)): _decode(arguments[1], item, f"{where}.{key}")
        for key, item in value.items()
    }


def _scalar(kind: type, value: object, where: str) -> object:
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        _fail(where, _SCALARS[kind], value)
    if isinstance(value, str) and _HALF.search(value):
        _fail(where, "text without half characters, which no file can hold", value)
    return value


def _tuple(kinds: tuple[Any, ...], value: object, where: str) -> tuple[object, ...]:
    if not isinstance(value, list):
        _fail(where, "a list", value)
    if kinds[-1] is Ellipsis:
        kinds = kinds[:1] * len(value)
    if len(kinds) != len(value):
        _fail(where, f"a list of {len(kinds)}", value)
    return tuple(
        _decode(kind, item, f"{where}[{index}]")
        for index, (kind, item) in enumerate(zip(kinds, value, strict=True))
    )


def _record(kind: Any, value: object, where: str) -> object:
    if not isinstance(value, dict):
        _fail(where, "an object", value)
    required = {field.name: _is_required(field) for field in fields(kind)}
    for name in required:
        if required[name] and name not in value:
            raise RecordError(f"the key {_join(where, name)!r} is missing")
    for name in value:
        if name not in required:
            raise RecordError(f"the key {_shorten(_join(where, name))} is unknown")
    hints = _hints(kind)
    values = {name: _decode(hints[name], value[name], _join(where, name)) for name in value}
    try:
        return kind(**values)
    except ValueError as error:
        raise RecordError(f"{where or kind.__name__}: {error}") from error


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return dict(get_type_hints(kind))


def _is_required(field: Any) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _fail(where: str, expected: str, value: object) -> NoReturn:
    raise RecordError(f"{where or 'it'} must be {expected}, not {_shorten(value)}")


def _shorten(value: object) -> str:
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else f"a list of {len(value)}"
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _refuse(constant: str) -> NoReturn:
    raise RecordError(f"it holds {constant}, which is no number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        _refuse(text[:20])
    return number


def _bounded_integer(text: str) -> int:
    if len(text) > 20 or abs(int(text)) >= _INTEGER_LIMIT:
        raise RecordError(f"it holds the integer {text[:20]}..., which is out of range")
    return int(text)
