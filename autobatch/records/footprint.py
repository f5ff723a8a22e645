"""Where every byte goes at the peak of a training window.

Invariant: the categories and the rounding sum exactly to `peak_allocated_bytes`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from autobatch.support.templates import render
from autobatch.support.units import format_bytes

__all__ = ["Evidence", "Footprint"]

_TEMPLATES = Path(__file__).parent / "templates"

Evidence = Literal["measured", "simulated", "predicted"]
"""How a figure is known: run on a GPU, run on the virtual GPU, or computed by the trace model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """Bytes by category when most of them are allocated, at one micro-batch on one GPU.

    Attributes:
        micro_batch: samples in each forward/backward.
        accumulation_steps: micro-batches between optimizer updates that were run; two stand for
            any number above one, so that a plan's own may be more.
        gpu: catalogue name of the GPU.
        evidence: how the figures are known.
        rounding_bytes: what the caching allocator adds by rounding and by blocks it does not split.
        peak_allocated_bytes: most bytes of live blocks at once; the sum of all categories.
        peak_reserved_bytes: most bytes held in segments by the caching allocator.
        context_bytes: CUDA context and kernels, outside the allocator.
        low_device_bytes, high_device_bytes: what the device would hold in nine of ten runs, by the
            errors of `autobatch.gpus.uncertainty`; None where a GPU was measured.
        kind: whose errors: of models with "convolutions", or of "products" alone; None where a GPU
            was measured, or in a plan from before there were two kinds.
    """

    micro_batch: int
    accumulation_steps: int
    gpu: str
    evidence: Evidence
    parameters_bytes: int
    buffers_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    temporaries_bytes: int
    inputs_bytes: int
    workspace_bytes: int
    other_bytes: int
    rounding_bytes: int
    peak_allocated_bytes: int
    peak_reserved_bytes: int
    context_bytes: int
    low_device_bytes: int | None = None
    high_device_bytes: int | None = None
    kind: Literal["convolutions", "products"] | None = None

    @property
    def peak_device_bytes(self) -> int:
        """What `nvidia-smi` would show at the peak: reserved plus context."""
        return self.peak_reserved_bytes + self.context_bytes

    @property
    def cached_bytes(self) -> int:
        """Reserved beyond the allocated peak: cached blocks and fragmentation."""
        return self.peak_reserved_bytes - self.peak_allocated_bytes

    @property
    def categories(self) -> dict[str, int]:
        """The parts of `peak_allocated_bytes`, by name, in the order reports print them."""
        return {
            "parameters": self.parameters_bytes,
            "buffers": self.buffers_bytes,
            "gradients": self.gradients_bytes,
            "optimizer state": self.optimizer_bytes,
            "activations": self.activations_bytes,
            "temporaries": self.temporaries_bytes,
            "inputs": self.inputs_bytes,
            "workspace": self.workspace_bytes,
            "other": self.other_bytes,
            "rounding": self.rounding_bytes,
        }

    def __repr__(self) -> str:
        """Name the answer; `print(footprint)` shows the account."""
        return (
            f"<Footprint of micro-batch {self.micro_batch:,} x {self._steps} on "
            f"{self.gpu}: {format_bytes(self.peak_allocated_bytes)} allocated, "
            f"{format_bytes(self.peak_reserved_bytes)} reserved, "
            f"{format_bytes(self.peak_device_bytes)} on the device, {self.evidence}>"
        )

    def __str__(self) -> str:
        """Render the account as a table; the parts sum to what is allocated."""
        head = f"micro-batch {self.micro_batch:,} x {self._steps} on {self.gpu} ({self.evidence})"
        lines = (
            f"  {name:<24}{size:>16,}{format_bytes(size):>10}" for name, size in self._account()
        )
        return "\n".join([head, *lines])

    def _repr_html_(self) -> str:
        """Render the account for notebooks: the answer, and a table with bars."""
        device = self.peak_device_bytes or 1
        plural = "step" if self.accumulation_steps == 1 else "steps"
        rows, before = [], 0
        for name, size in self._account():
            is_sum = name.startswith("= ")
            rows.append(
                {
                    "name": name.removeprefix("= "),
                    "is_sum": is_sum,
                    "bytes": f"{size:,}",
                    "size": format_bytes(size),
                    "share": f"{size / device:.1%}",
                    "start": f"{0 if is_sum else 100 * before / device:.2f}",
                    "width": f"{100 * size / device:.2f}",
                }
            )
            before += 0 if is_sum else size
        return render(
            _TEMPLATES,
            "footprint.html.jinja",
            answer=f"{format_bytes(self.peak_device_bytes)} on the device",
            subject=f"micro-batch {self.micro_batch:,}, "
            f"{self._steps} accumulation {plural} on {self.gpu}, {self.evidence}",
            rows=rows,
        )

    @property
    def _steps(self) -> str:
        """The accumulation steps: two stand for any number above one, whose memory is the same."""
        return "2 or more" if self.accumulation_steps == 2 else f"{self.accumulation_steps:,}"

    def _account(self) -> list[tuple[str, int]]:
        """Return every part in order, and the sums of the parts before them."""
        return [
            *((name, size) for name, size in self.categories.items() if size),
            ("= peak allocated", self.peak_allocated_bytes),
            ("cached by the allocator", self.cached_bytes),
            ("= peak reserved", self.peak_reserved_bytes),
            ("CUDA context", self.context_bytes),
            ("= on the device", self.peak_device_bytes),
        ]
