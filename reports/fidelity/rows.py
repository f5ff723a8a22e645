"""What is compared: a model, a card, a micro-batch, a precision, with or without checkpointing.

Invariant: a key names one row, today and in an older journal.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from reports.common.journal import Record

CARDS = ("a100-40gb", "h100-80gb", "rtx-4090")
MICRO_BATCHES = (2, 16)
PRECISIONS = ("fp32", "bf16")
WINDOWS = 2


@dataclass(frozen=True, slots=True)
class Row:
    """One comparison.

    Attributes:
        model: `library:name`, as `subjects.py` builds it.
        gpu: a card of the bench, and of the catalogue.
        micro_batch: samples in one forward and backward pass.
        precision: "fp32", or "bf16" for autocast.
        checkpointing: whether the model's own activation checkpointing is on.
        accumulation_steps: micro-batches in a window.
    """

    model: str
    gpu: str = CARDS[0]
    micro_batch: int = MICRO_BATCHES[0]
    precision: str = PRECISIONS[0]
    checkpointing: bool = False
    accumulation_steps: int = 2

    @property
    def key(self) -> str:
        """Name it in journals."""
        kind = f"{self.precision}{' checkpointed' if self.checkpointing else ''}"
        return f"{self.model} {self.micro_batch} x {self.accumulation_steps} {kind} {self.gpu}"

    @property
    def autocast(self) -> str | None:
        """The option of `predict`."""
        return None if self.precision == "fp32" else self.precision

    def task(self) -> Record:
        """Return a worker's task."""
        return {"keys": [self.key], **asdict(self)}

    @classmethod
    def of(cls, task: dict[str, Any]) -> Row:
        """Read a worker's task."""
        return cls(**{name: task[name] for name in cls.__dataclass_fields__})
