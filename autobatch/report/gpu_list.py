"""What `autobatch gpus` lists: the known GPUs and those of this machine."""

from __future__ import annotations

from collections.abc import Iterable

from autobatch.gpus.catalogue import GpuSpec
from autobatch.gpus.nvml import InstalledGpu
from autobatch.report.document import ContentBlock, Document, Paragraph, Section, Table, printable
from autobatch.support.units import format_bytes

__all__ = ["gpu_list"]

_PRECISIONS = ("fp32", "tf32", "fp16", "bf16")
_COLUMNS = ("name", "capacity", "context", "compute", "GB/s", *_PRECISIONS)


def gpu_list(catalogue: Iterable[GpuSpec], installed: Iterable[InstalledGpu]) -> Document:
    """Return the known GPUs, and those that are in this machine."""
    known = tuple(catalogue)
    here = tuple(
        (
            str(gpu.index),
            "not told by the driver" if gpu.name is None else printable(gpu.name),
            _size(gpu.total_bytes),
            _size(gpu.used_bytes),
        )
        for gpu in installed
    )
    in_machine: ContentBlock = Paragraph("No NVIDIA GPU or no driver: plans are simulated.")
    if here:
        in_machine = Table(("index", "name", "total", "in use"), "llrr", here)
    return Document(
        title=f"{len(known)} known GPUs",
        subtitle="capacity is what CUDA reports; TFLOP/s are dense peaks; - is unknown or absent",
        sections=(
            Section("", (Table(_COLUMNS, "lrrrrrrrr", tuple(map(_gpu_row, known))),)),
            Section("In this machine", (in_machine,)),
        ),
    )


def _size(size_bytes: int | None) -> str:
    return "-" if size_bytes is None else format_bytes(size_bytes)


def _gpu_row(gpu: GpuSpec) -> tuple[str, ...]:
    bandwidth = gpu.bandwidth_bytes_per_s
    return (
        gpu.name,
        format_bytes(gpu.capacity_bytes),
        format_bytes(gpu.context_bytes),
        "{}.{}".format(*gpu.compute_capability),
        "-" if bandwidth is None else f"{bandwidth / 1e9:,.0f}",
        *(
            f"{gpu.flops[precision] / 1e12:,.0f}" if precision in gpu.flops else "-"
            for precision in _PRECISIONS
        ),
    )
