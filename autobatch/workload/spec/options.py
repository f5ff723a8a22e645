"""The options of a SPEC that names a library's model.

Those that all libraries share are taken out one by one; what is left goes to the library.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, TypeAlias
from urllib.parse import parse_qsl

import torch

from autobatch.errors import SpecError

__all__ = ["Options", "parsed", "refuse_downloads", "take_dtype", "take_size"]

Options: TypeAlias = dict[str, Any]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Options that would fetch weights.
DOWNLOADS = frozenset({"pretrained", "checkpoint_path", "weights", "weights_backbone"})


def parsed(spec: str, query: str) -> Options:
    """Parse `key=value&key=value`: numbers, booleans, null and lists as in JSON, else text."""
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=True) if query else []
    except ValueError:
        raise SpecError(
            f"{spec!r} has options that are not key=value joined by &: {query!r}"
        ) from None
    return {key: _value(text) for key, text in pairs}


def _value(text: str) -> Any:
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def take_dtype(options: Options) -> torch.dtype | None:
    """Take out the dtype of the parameters; None where none is asked for.

    Raises:
        SpecError: parameters have no such dtype.
    """
    name = options.pop("dtype", None)
    if name is None:
        return None
    dtype = DTYPES.get(name) or getattr(torch, str(name), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise SpecError(f"dtype={name} is not a dtype of parameters: use {', '.join(DTYPES)}")
    return dtype


def take_size(options: Options, key: str) -> int | None:
    """Take out a size; None where none is asked for.

    Raises:
        SpecError: it is no positive whole number.
    """
    size = options.pop(key, None)
    if size is not None and (not isinstance(size, int) or size < 1):
        raise SpecError(f"{key}={size} is not a size: use a positive whole number")
    return size


def refuse_downloads(options: Mapping[str, Any]) -> None:
    """Raise SpecError for an option that would fetch weights."""
    for key in sorted(DOWNLOADS.intersection(options)):
        raise SpecError(f"{key}= is not taken: weights are random here, and nothing is downloaded")
