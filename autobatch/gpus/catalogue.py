"""The GPUs that autobatch knows without having one: capacities, capabilities, speeds, sources.

Invariant: `capacity_bytes` is what CUDA reports as total memory, not the size on the box.

Drivers differ by up to 1 % in what they report for one card; the catalogue holds the smallest
figure seen from a Linux driver of CUDA 12 or later, so that a plan also fits elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from types import MappingProxyType

from autobatch.errors import UnknownGpuError, UsageError
from autobatch.support.units import GIB, MIB, format_bytes, parse_bytes

__all__ = ["CATALOGUE", "GpuSpec", "find_gpu", "is_device"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuSpec:
    """One model of GPU, or any card you describe.

    Attributes:
        name: lower-case catalogue name, such as "a100-40gb".
        capacity_bytes: total memory as CUDA reports it.
        compute_capability: (major, minor).
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


def find_gpu(name: str) -> GpuSpec:
    """Return a GPU by its catalogue name, a common spelling of it, or a plain size.

    A plain size, such as "24GiB", is a card of compute capability 8.0 with that capacity.

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
    if re.fullmatch(r"\s*[\d.]+\s*[KMGT]I?B?\s*", name, re.IGNORECASE):
        return _card_of_size("".join(name.split()))
    model, size_gb = _model_and_size(name)
    matches = [
        spec
        for known, spec in CATALOGUE.items()
        if model == _model_and_size(known)[0] and _is_sold_as(spec, size_gb)
    ]
    if len(matches) == 1:
        return matches[0]
    if matches:
        candidates = " or ".join(spec.name for spec in matches)
        raise UnknownGpuError(f"GPU {name!r} comes in several sizes: say {candidates}")
    nearest = get_close_matches(_words(name).replace(" ", "-"), CATALOGUE, cutoff=0.5)
    hint = f"did you mean {', '.join(nearest)}? " if nearest else ""
    raise UnknownGpuError(
        f"GPU {name!r} is not in the catalogue: {hint}`autobatch gpus` lists the known ones, "
        "and any capacity works instead of a name, such as --gpu 24GiB"
    )


def is_device(gpu: object) -> bool:
    """Return whether a GPU is meant that is in this machine: None, "cuda", "cuda:1", a device.

    >>> is_device("cuda:1"), is_device("a100-40gb")
    (True, False)
    """
    return gpu is None or re.fullmatch(r"cuda(:\d+)?", str(gpu)) is not None


_NOISE = re.compile(r"nvidia|geforce|tesla|rtx|\bsxm\d?\b|\bhbm\d?e?\b|\bgpu\b")
_SIZE = re.compile(r"\b(\d+) ?g(?:i?b)?\b")


def _words(name: str) -> str:
    """Lower-case a name and separate its words by single spaces."""
    return " ".join(re.findall(r"[a-z0-9]+", name.lower()))


def _model_and_size(name: str) -> tuple[str, int | None]:
    """Split "NVIDIA A100-SXM4-40GB" into ("a100", 40)."""
    words = _words(name)
    size = _SIZE.search(words)
    model = _NOISE.sub("", _SIZE.sub("", words)).replace(" ", "")
    return model, int(size[1]) if size else None


def _is_sold_as(spec: GpuSpec, size_gb: int | None) -> bool:
    """Whether the size on the box agrees: CUDA reports up to a tenth less."""
    return size_gb is None or 0.9 <= spec.capacity_bytes / (size_gb * GIB) <= 1.0


def _card_of_size(text: str) -> GpuSpec:
    return GpuSpec(
        name=text,
        capacity_bytes=parse_bytes(text),
        context_bytes=500 * MIB,
        sources={
            "capacity_bytes": "as given",
            "compute_capability": "assumed: that of the A100",
            "context_bytes": f"assumed: that of the L40S; {_CONTEXT}",
        },
    )


_CONTEXT = (
    "estimate: non-PyTorch memory of single-GPU processes in out-of-memory messages of PyTorch 2 "
    "(public logs), rounded up; it grows with the multiprocessors and the kernels loaded"
)
_CAPABILITY = "NVIDIA, CUDA GPU Compute Capability (table)"
_DEVICE_QUERY = "deviceQuery in a public log, driver of CUDA "
_TORCH = "torch.cuda.get_device_properties in a public log, whole MiB"
_OOM = "CUDA out-of-memory message of PyTorch in a public log, rounded down from two decimals"
_AMPERE = "NVIDIA Ampere GA102 GPU Architecture (whitepaper)"
_ADA = "NVIDIA Ada GPU Architecture (whitepaper)"


def _gpu(
    name: str,
    capacity_bytes: int,
    compute_capability: tuple[int, int],
    *,
    capacity_from: str,
    context_mib: int,
    context_from: str = _CONTEXT,
    gb_per_s: int,
    tflops: dict[str, float],
    speeds_from: str,
) -> GpuSpec:
    """Build a row of the catalogue; tensor-core figures are dense, with fp32 accumulation."""
    return GpuSpec(
        name=name,
        capacity_bytes=capacity_bytes,
        compute_capability=compute_capability,
        context_bytes=context_mib * MIB,
        bandwidth_bytes_per_s=gb_per_s * 10**9,
        flops={precision: value * 1e12 for precision, value in tflops.items()},
        sources={
            "capacity_bytes": capacity_from,
            "compute_capability": _CAPABILITY,
            "context_bytes": context_from,
            "bandwidth_bytes_per_s": speeds_from,
            "flops": speeds_from,
        },
    )


_ROWS = (
    _gpu(
        "t4", 15_642_329_088, (7, 5), capacity_from=_DEVICE_QUERY + "12.5",
        context_mib=150, gb_per_s=300, tflops={"fp32": 8.1, "fp16": 65},
        speeds_from="NVIDIA T4 data sheet",
    ),
    _gpu(
        "v100-16gb", 16_928_342_016, (7, 0), capacity_from=_DEVICE_QUERY + "12.4",
        context_mib=400, gb_per_s=900, tflops={"fp32": 15.7, "fp16": 125},
        speeds_from="NVIDIA V100 data sheet, SXM2",
    ),
    _gpu(
        "v100-32gb", 34_072_559_616, (7, 0), capacity_from=_DEVICE_QUERY + "12.9",
        context_mib=400, gb_per_s=900, tflops={"fp32": 15.7, "fp16": 125},
        speeds_from="NVIDIA V100 data sheet, SXM2",
    ),
    _gpu(
        "rtx-3060", 11_901 * MIB, (8, 6), capacity_from=_DEVICE_QUERY + "13.0, whole MiB",
        context_mib=200, context_from=f"assumed from cards of like size; {_CONTEXT}",
        gb_per_s=360, tflops={"fp32": 12.7, "tf32": 12.7, "fp16": 25.5, "bf16": 25.5},
        speeds_from=f"NVIDIA GeForce RTX 3060 (12 GB) product page; computed as in {_AMPERE}",
    ),
    _gpu(
        "rtx-3090", 24_120 * MIB, (8, 6), capacity_from=_OOM,
        context_mib=360, gb_per_s=936,
        tflops={"fp32": 35.6, "tf32": 35.6, "fp16": 71, "bf16": 71}, speeds_from=_AMPERE,
    ),
    _gpu(
        "rtx-4060", 7_900 * MIB, (8, 9), capacity_from=_OOM,
        context_mib=150, gb_per_s=272,
        tflops={"fp32": 15.1, "tf32": 15.1, "fp16": 30.2, "bf16": 30.2},
        speeds_from=f"NVIDIA GeForce RTX 4060 product page; computed as in {_ADA}",
    ),
    _gpu(
        "rtx-4090", 25_250_627_584, (8, 9), capacity_from=_DEVICE_QUERY + "13.0",
        context_mib=480, gb_per_s=1008,
        tflops={"fp32": 82.6, "tf32": 82.6, "fp16": 165.2, "bf16": 165.2}, speeds_from=_ADA,
    ),
    _gpu(
        "rtx-5090", 33_660_534_784, (12, 0), capacity_from=_DEVICE_QUERY + "13.0",
        context_mib=620, gb_per_s=1792,
        tflops={"fp32": 104.8, "tf32": 104.8, "fp16": 209.5, "bf16": 209.5},
        speeds_from="NVIDIA RTX Blackwell GPU Architecture (whitepaper)",
    ),
    _gpu(
        "rtx-a6000", 48_665 * MIB, (8, 6), capacity_from=_OOM,
        context_mib=330, gb_per_s=768,
        tflops={"fp32": 38.7, "tf32": 77.4, "fp16": 154.8, "bf16": 154.8}, speeds_from=_AMPERE,
    ),
    _gpu(
        "a10g", 22_587 * MIB, (8, 6), capacity_from=_TORCH,
        context_mib=330, context_from=f"assumed: that of the RTX A6000, same chip; {_CONTEXT}",
        gb_per_s=600, tflops={"fp32": 35, "tf32": 35, "fp16": 70, "bf16": 70},
        speeds_from="NVIDIA A10G data sheet (for AWS)",
    ),
    _gpu(
        "l4", 23_583_784_960, (8, 9), capacity_from=_DEVICE_QUERY + "12.2",
        context_mib=260, gb_per_s=300,
        tflops={"fp32": 30.3, "tf32": 60, "fp16": 121, "bf16": 121},
        speeds_from="NVIDIA L4 data sheet, sparse figures halved",
    ),
    _gpu(
        "l40s", 47_576_711_168, (8, 9), capacity_from=_DEVICE_QUERY + "12.4",
        context_mib=500, gb_per_s=864,
        tflops={"fp32": 91.6, "tf32": 183, "fp16": 362, "bf16": 362},
        speeds_from="NVIDIA L40S data sheet",
    ),
    _gpu(
        "a100-40gb", 42_298_834_944, (8, 0), capacity_from=_DEVICE_QUERY + "12.2",
        context_mib=550, gb_per_s=1555,
        tflops={"fp32": 19.5, "tf32": 156, "fp16": 312, "bf16": 312},
        speeds_from="NVIDIA A100 data sheet, SXM",
    ),
    _gpu(
        "a100-80gb", 84_987_740_160, (8, 0), capacity_from=_DEVICE_QUERY + "12.2",
        context_mib=550, gb_per_s=2039,
        tflops={"fp32": 19.5, "tf32": 156, "fp16": 312, "bf16": 312},
        speeds_from="NVIDIA A100 data sheet, SXM",
    ),
    _gpu(
        "h100-80gb", 85_017_755_648, (9, 0), capacity_from=_DEVICE_QUERY + "13.0",
        context_mib=680, context_from=f"assumed: that of the H200, same chip; {_CONTEXT}",
        gb_per_s=3350, tflops={"fp32": 67, "tf32": 494.5, "fp16": 989.5, "bf16": 989.5},
        speeds_from="NVIDIA H100 data sheet, SXM, sparse figures halved",
    ),
    _gpu(
        "h200", 143_156 * MIB, (9, 0), capacity_from=_TORCH,
        context_mib=680, gb_per_s=4800,
        tflops={"fp32": 67, "tf32": 494.5, "fp16": 989.5, "bf16": 989.5},
        speeds_from="NVIDIA H200 data sheet, SXM, sparse figures halved",
    ),
    _gpu(
        "b200", 182_631 * MIB, (10, 0), capacity_from=_TORCH,
        context_mib=720, gb_per_s=7700,
        tflops={"fp32": 75, "tf32": 1100, "fp16": 2250, "bf16": 2250},
        speeds_from="NVIDIA Blackwell data sheet, HGX B200, sparse figures halved",
    ),
)  # fmt: skip

CATALOGUE: Mapping[str, GpuSpec] = MappingProxyType({spec.name: spec for spec in _ROWS})
"""Every known GPU by its name."""
