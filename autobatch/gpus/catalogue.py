"""The GPUs that autobatch knows without having one: capacities, capabilities, speeds, sources.

Invariant: `capacity_bytes` is what CUDA reports as total memory, not the size on the box.

Drivers differ by up to 1 % in what they report for one card; the catalogue holds the smallest
figure seen from a Linux driver of CUDA 12 or later, so that a plan also fits elsewhere.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType

from autobatch.errors import UnknownGpuError, UsageError
from autobatch.support.units import GIB, format_bytes, parse_bytes
from autobatch.support.wording import given

__all__ = ["CATALOGUE", "GpuSpec", "by_capacity", "find_gpu", "find_installed", "is_device"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuSpec:
    """One model of GPU, or any card you describe.

    Attributes:
        name: lower-case catalogue name, such as "a100-40gb".
        capacity_bytes: total memory as CUDA reports it.
        compute_capability: (major, minor).
        multiprocessors: streaming multiprocessors; kernels that split their work over them take
            memory in proportion.
        context_bytes: typical CUDA context of a training process, outside the caching allocator.
        bandwidth_bytes_per_s: peak memory bandwidth; None where unknown.
        flops: peak dense FLOP/s by precision: "fp32", "tf32", "fp16", "bf16" (tensor cores where
            there are any); a precision that is absent is unknown or not supported.
        sources: where each figure comes from, by attribute name.

    Raises:
        UsageError: the capacity is not positive, or the context does not leave any of it.

    >>> GpuSpec(name="my-card", capacity_bytes=24 * 2**30).compute_capability
    (8, 0)
    """

    name: str
    capacity_bytes: int
    compute_capability: tuple[int, int] = (8, 0)
    multiprocessors: int = 108
    context_bytes: int = 0
    bandwidth_bytes_per_s: int | None = None
    flops: Mapping[str, float] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse a card without usable memory."""
        if self.capacity_bytes <= 0:
            raise UsageError(
                f"GPU {self.name} has a capacity of {self.capacity_bytes} bytes: "
                "give a positive one, such as capacity_bytes=24 * 2**30"
            )
        if not 0 <= self.context_bytes < self.capacity_bytes:
            raise UsageError(
                f"GPU {self.name} has {format_bytes(self.capacity_bytes)}, and a CUDA context of "
                f"{format_bytes(self.context_bytes)} does not fit in it: use a larger capacity"
            )


def find_gpu(name: str, *, asked_as: str = "gpu") -> GpuSpec:
    """Return a GPU by its catalogue name, a common spelling of it, or a plain size.

    A plain size, such as "24GiB", is a card of compute capability 8.0 with that capacity.

    Args:
        name: of the GPU, or a size.
        asked_as: the argument that has it, for an error that says what to write there.

    Raises:
        UnknownGpuError: no GPU in the catalogue has that name, or more than one.
        UsageError: a plain size is too small to hold a CUDA context.

    >>> find_gpu("NVIDIA A100-SXM4-40GB").name
    'a100-40gb'
    >>> find_gpu("RTX 3090").compute_capability
    (8, 6)
    >>> find_gpu("24GiB").capacity_bytes
    25769803776
    """
    if re.fullmatch(r"\s*[\d.]+\s*([KMG]I?B?|T(I?B)?)\s*", name, re.IGNORECASE):
        return _card_of_size("".join(name.split()))
    matches = _named(name)
    if len(matches) == 1:
        return matches[0]
    if matches:
        candidates = " or ".join(spec.name for spec in matches)
        raise UnknownGpuError(f"GPU {name!r} comes in several sizes: say {candidates}")
    nearest = _nearest(name)
    size = given(asked_as, "24GiB")
    hint = f"did you mean {', '.join(nearest)}? " if nearest else ""
    raise UnknownGpuError(
        f"GPU {name!r} is not in the catalogue: {hint}`autobatch gpus` lists the known ones, and "
        f"any capacity works instead of a name, such as {size}"
    )


def find_installed(name: str, capacity_bytes: int) -> GpuSpec | None:
    """Return the catalogue's card of a name that a driver gives; None where it knows none.

    Drivers give one name to cards of several sizes; the size that is nearest is then meant.

    >>> find_installed("NVIDIA GeForce RTX 3080", 12 * 2**30).name
    'rtx-3080-12gb'
    >>> find_installed("NVIDIA GeForce RTX 4090 Laptop GPU", 16 * 2**30)
    """
    matches = _named(name)
    return min(matches, key=lambda spec: abs(spec.capacity_bytes - capacity_bytes), default=None)


def is_device(gpu: object) -> bool:
    """Return whether a GPU is meant that is in this machine: None, "cuda", "cuda:1", a device.

    >>> is_device("cuda:1"), is_device("a100-40gb")
    (True, False)
    """
    return gpu is None or re.fullmatch(r"cuda(:\d+)?", str(gpu)) is not None


_SMALLEST_GIB = 4
"""Plain numbers below are no sizes of cards that people train on."""

_NOISE = re.compile(r"nvidia|geforce|tesla|[rg]tx|\bgraphics\b|\bcard\b|\bhbm\d?e?\b|\bgpu\b")
_SIZE = re.compile(r"\b(\d+) ?g(?:i?b)?\b")
_FORM = re.compile(r"\b(sxm\d?|pcie|fhhl|dgxs)\b")
"""The slot that a card is made for; cards that only differ in it have the same memory."""
_MOBILE = re.compile(r"\b(mobile|notebook|max ?q)\b")


def _words(name: str) -> str:
    """Lower-case a name and separate its words by single spaces."""
    return _MOBILE.sub("laptop", " ".join(re.findall(r"[a-z0-9]+", name.lower())))


def _model(words: str) -> str:
    """Return what is left of a name without its size and the words that tell nothing.

    >>> _model("nvidia a100 sxm4 40gb"), _model("nvidia h100 pcie")
    ('a100sxm4', 'h100pcie')
    """
    return _NOISE.sub("", _SIZE.sub("", words)).replace(" ", "")


def _named(name: str) -> list[GpuSpec]:
    """Return the cards that a name may mean: several where it leaves out the size."""
    words = _words(name)
    if (known := words.removeprefix("nvidia ")) in _ALIASES:
        return [CATALOGUE[_ALIASES[known]]]
    size = _SIZE.search(words)
    size_gb = int(size[1]) if size else None
    for spelled in (words, _FORM.sub("", words)):  # H100 PCIe is a card of its own, A100 PCIe not
        model = _model(spelled)
        matches = [spec for spec in CATALOGUE.values() if model == _model(_words(spec.name))]
        if matches:
            return [spec for spec in matches if _is_sold_as(spec, size_gb)]
    return []


def _nearest(name: str) -> list[str]:
    """Return what a name that is not known may have been meant for, the likeliest first."""
    words = _words(name)
    if words.isdecimal() and int(words) >= _SMALLEST_GIB:
        return [f"{words}GiB"]
    models: dict[str, list[str]] = {}
    for known in CATALOGUE:
        models.setdefault(_model(_words(known)), []).append(known)
    asked = _model(_FORM.sub("", words))
    # a version of a known card, but for a laptop, whose card is a smaller one
    family = [model for model in models if asked.startswith(model) and "laptop" not in asked]
    meant = [*sorted(family, key=len, reverse=True), *get_close_matches(asked, models, cutoff=0.65)]
    return [known for model in dict.fromkeys(meant) for known in models[model]][:3]


def _is_sold_as(spec: GpuSpec, size_gb: int | None) -> bool:
    """Whether the size on the box agrees: CUDA reports up to a tenth less."""
    return size_gb is None or 0.9 <= spec.capacity_bytes / (size_gb * GIB) <= 1.0


def _card_of_size(text: str) -> GpuSpec:
    like = CATALOGUE["l40s"]
    return GpuSpec(
        name=text,
        capacity_bytes=parse_bytes(text),
        context_bytes=like.context_bytes,
        sources={
            "capacity_bytes": "as given",
            "compute_capability": "assumed: that of the A100",
            "multiprocessors": "assumed: those of the A100",
            "context_bytes": f"assumed: that of the L40S; {like.sources['context_bytes']}",
        },
    )


def _read_catalogue() -> tuple[dict[str, GpuSpec], dict[str, str]]:
    """Read the cards of `catalogue.json`, and the names that they are called by besides.

    TFLOP/s are dense, with fp32 accumulation.
    """
    text = Path(__file__).with_name("catalogue.json").read_text(encoding="utf-8")
    cards: dict[str, GpuSpec] = {}
    aliases: dict[str, str] = {}
    for name, card in json.loads(text).items():
        aliases.update(dict.fromkeys(card.pop("aliases", ()), name))
        capability = tuple(card.pop("compute_capability"))
        flops = {precision: n * 1e12 for precision, n in card.pop("tflops").items()}
        cards[name] = GpuSpec(name=name, compute_capability=capability, flops=flops, **card)
    return cards, aliases


_cards, _ALIASES = _read_catalogue()
CATALOGUE: Mapping[str, GpuSpec] = MappingProxyType(_cards)
"""Every known GPU by its name."""


def by_capacity() -> list[GpuSpec]:
    """Return every known GPU, the smallest first."""
    return sorted(CATALOGUE.values(), key=lambda card: card.capacity_bytes)
