"""What is compared: a model, a card, a micro-batch, a precision, with or without checkpointing.

Invariant: a key names one row, today and in an older journal.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
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
        """Read a worker's task.

        >>> Row.of(Row("timm:vit_tiny_patch16_224").task()).key
        'timm:vit_tiny_patch16_224 2 x 2 fp32 a100-40gb'
        """
        return cls(**{name: task[name] for name in cls.__dataclass_fields__})


def rows(models: Sequence[str], each: int) -> Iterator[Row]:
    """Yield rows of every model, so that all of them together have every combination as often.

    Args:
        models: their names.
        each: rows of one model; 24 is every combination.

    >>> [row.key for row in rows(["a", "b"], 1)]
    ['a 2 x 2 fp32 a100-40gb', 'b 16 x 2 bf16 checkpointed h100-80gb']
    """
    combinations = [*product((False, True), PRECISIONS, MICRO_BATCHES, CARDS)]
    step = 19  # coprime to their number: goes through all of them, far apart
    for place, model in enumerate(models):
        for number in range(each):
            index = step * (place * each + number) % len(combinations)
            checkpointing, precision, micro_batch, gpu = combinations[index]
            yield Row(model, gpu, micro_batch, precision, checkpointing)
