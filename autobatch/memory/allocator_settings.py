"""The settings of PyTorch's CUDA caching allocator, and how their text is read.

Source: `c10/core/AllocatorConfig.cpp`. Invariant: the defaults are PyTorch's.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from autobatch.errors import UsageError
from autobatch.support.units import MIB
from autobatch.support.wording import near

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "LARGE_SEGMENT_BYTES",
    "SIZE_CLASSES",
    "VARIABLES",
    "AllocatorSettings",
    "is_well_formed",
]

VARIABLES: Final = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""Which variables of the environment hold the settings, the one that counts first."""

LARGE_SEGMENT_BYTES: Final = 20 * MIB
SIZE_CLASSES: Final = tuple(1 << power for power in range(16))  # MiB

_SIMULATED: Final = (
    "expandable_segments",
    "garbage_collection_threshold",
    "large_segment_size_mb",
    "max_non_split_rounding_mb",
    "max_split_size_mb",
    "roundup_power2_divisions",
)
_OF_NO_BEARING: Final = (
    "backend",
    "graph_capture_record_stream_reuse",
    "per_process_memory_fraction",
    "pinned_free_catch_all",
    "pinned_max_cached_size_mb",
    "pinned_max_round_threshold_mb",
    "pinned_num_register_threads",
    "pinned_reserve_segment_size_mb",
    "pinned_use_background_threads",
    "pinned_use_cuda_host_register",
    "pinned_use_hip_host_register",
    "release_lock_on_cudamalloc",
    "release_lock_on_hipmalloc",
    "throw_on_cudamalloc_oom",
)
"""Keys that PyTorch knows besides, in `c10/core/AllocatorConfig.h` and `CUDAAllocatorConfig.h`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AllocatorSettings:
    """What `PYTORCH_CUDA_ALLOC_CONF` changes in the allocator; the defaults are PyTorch's.

    Attributes:
        max_split_size_bytes: blocks of this size or more are never split; None for no such limit.
        max_non_split_rounding_bytes: by how much such a block may exceed the request it serves.
        large_segment_bytes: the segment made for requests between 1 and 10 MiB.
        roundup_power2_divisions: steps between two powers of two to which sizes are rounded up;
            one number for all sizes, or one by size class (1, 2, 4, ... 32768 MiB). 0 for none.
        garbage_collection_threshold: share of the limit above which unused segments are released
            before a new one is made; 0 for never.
        expandable_segments: one growing segment per stream and pool.
        unknown: keys of the parsed text that do not bear on this allocator.
    """

    max_split_size_bytes: int | None = None
    max_non_split_rounding_bytes: int = LARGE_SEGMENT_BYTES
    large_segment_bytes: int = LARGE_SEGMENT_BYTES
    roundup_power2_divisions: int | Mapping[int, int] = 0
    garbage_collection_threshold: float = 0.0
    expandable_segments: bool = False
    unknown: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read the text of `PYTORCH_CUDA_ALLOC_CONF`.

        Raises:
            UsageError: a value that PyTorch would refuse, too.

        >>> AllocatorSettings.parse("max_split_size_mb:128").max_split_size_bytes
        134217728
        """
        values: dict[str, str] = {}
        for item in re.split(r",(?![^\[]*\])", re.sub(r"\s", "", text)):
            key, colon, value = item.partition(":")
            if item and not (key and colon and value):
                raise UsageError(f"allocator setting {item!r} is not of the form key:value")
            if item:
                values[key] = value
        large = _megabytes(values, "large_segment_size_mb", 10)
        minimum = (large or LARGE_SEGMENT_BYTES) // MIB
        rounding = _megabytes(values, "max_non_split_rounding_mb", minimum)
        return cls(
            max_split_size_bytes=_megabytes(values, "max_split_size_mb", minimum),
            max_non_split_rounding_bytes=rounding or LARGE_SEGMENT_BYTES,
            large_segment_bytes=large or LARGE_SEGMENT_BYTES,
            roundup_power2_divisions=_parse_divisions(values.pop("roundup_power2_divisions", "1")),
            garbage_collection_threshold=_parse_threshold(values),
            expandable_segments=_parse_flag(values, "expandable_segments"),
            unknown=tuple(values),
        )

    @classmethod
    def of_environment(cls) -> Self:
        """Read the settings that a process started now would get.

        Raises:
            UsageError: a value that PyTorch would refuse, too.
        """
        return cls.parse(next((os.environ[n] for n in VARIABLES if os.environ.get(n)), ""))

    def require_known(self) -> Self:
        """Return the settings, where PyTorch knows all of their keys.

        Raises:
            UsageError: it does not, and would refuse them.

        >>> AllocatorSettings.parse("backend:native").require_known().unknown
        ('backend',)
        """
        for key in self.unknown:
            if key not in _OF_NO_BEARING:
                hint = near(key, (*_SIMULATED, *_OF_NO_BEARING))
                known = ", ".join(_SIMULATED)
                raise UsageError(f"there is no allocator setting {key!r}{hint}; settings: {known}")
        return self

    def divisions(self, size_bytes: int) -> int:
        """Return the roundup divisions that apply to a request of `size_bytes`."""
        if isinstance(self.roundup_power2_divisions, int):
            return self.roundup_power2_divisions
        power = min(max(size_bytes.bit_length() - MIB.bit_length(), 0), len(SIZE_CLASSES) - 1)
        return self.roundup_power2_divisions.get(SIZE_CLASSES[power], 0)


_ITEM = r"[^\s,:\[\]]+:(?:[^\s,:\[\]]+|\[[^\[\]]*\])"
_FORM = re.compile(rf"(?:{_ITEM}(?:,{_ITEM})*,?)?")


def is_well_formed(text: str) -> bool:
    """Whether settings are written `key:value,key:value`, which PyTorch reads as it is imported.

    >>> is_well_formed("expandable_segments:True"), is_well_formed("expandable_segments")
    (True, False)
    """
    return _FORM.fullmatch(re.sub(r"\s", "", text)) is not None


def _refuse(key: str, value: str, expected: str) -> UsageError:
    return UsageError(f"allocator setting {key}:{value} cannot be used: give {expected}")


def _megabytes(values: dict[str, str], key: str, minimum: int) -> int | None:
    value = values.pop(key, None)
    if value is None:
        return None
    if not (value.isdecimal() and int(value) >= minimum):
        raise _refuse(key, value, f"a whole number of MiB, at least {minimum}")
    return int(value) * MIB


def _parse_threshold(values: dict[str, str]) -> float:
    value = values.pop("garbage_collection_threshold", None)
    if value is None:
        return 0.0
    if not (re.fullmatch(r"\d*\.?\d+", value) and 0 < float(value) < 1):
        raise _refuse("garbage_collection_threshold", value, "a number between 0 and 1")
    return float(value)


def _parse_flag(values: dict[str, str], key: str) -> bool:
    value = values.pop(key, "False")
    if value not in ("True", "False"):
        raise _refuse(key, value, "True or False")
    return value == "True"


def _parse_divisions(value: str) -> int | dict[int, int]:
    """Parse `4`, or `[64:8,256:4,>:1]`: classes in MiB; the first also covers all smaller ones."""
    expected = "a power of two, or a list such as [64:8,256:4,>:1] of powers of two"
    refusal = _refuse("roundup_power2_divisions", value, expected)
    if not value.startswith("["):
        if not _is_power_of_two(value):
            raise refusal
        return 0 if int(value) == 1 else int(value)
    table = dict.fromkeys(SIZE_CLASSES, 0)
    last = 0
    for item in value.strip("[]").split(","):
        size_class, _, divisions = item.partition(":")
        if not (divisions == "0" or _is_power_of_two(divisions)):
            raise refusal
        if size_class == ">":
            table.update({mib: int(divisions) for mib in SIZE_CLASSES if mib > last})
        elif _is_power_of_two(size_class):
            mib = min(int(size_class), SIZE_CLASSES[-1])
            covered = [mib] if last else [smaller for smaller in SIZE_CLASSES if smaller <= mib]
            table.update(dict.fromkeys(covered, int(divisions)))
            last = mib
        else:
            raise refusal
    return table


def _is_power_of_two(text: str) -> bool:
    return text.isdecimal() and int(text).bit_count() == 1
