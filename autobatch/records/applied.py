"""A lever that a plan was made with: what it is called, and the code that does it.

Invariant: plain text, which is shown and copied, and never run from a record.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from typing import Any

__all__ = ["AppliedLever"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AppliedLever:
    """A setting of a lever that the training run of a plan has.

    Attributes:
        lever: the name of the lever, such as "checkpointing".
        value: the setting, such as "every block".
        code: lines of plain PyTorch that do it to `model`, `optimizer`, `batch` or the loop.
        trainer: arguments of Transformers' `TrainingArguments` that do it, or None.
    """

    lever: str
    value: str
    code: str
    trainer: str | None = None

    def __post_init__(self) -> None:
        """Raise ValueError for arguments that are not written as names and plain values."""
        _ = self.arguments

    @property
    def label(self) -> str:
        """The lever and its setting, as tables name them."""
        return f"{self.lever}: {self.value}"

    @property
    def arguments(self) -> dict[str, Any]:
        """What `trainer` says, by name; empty where no argument does what the lever does.

        >>> AppliedLever(lever="precision", value="tf32", code="", trainer="tf32=True").arguments
        {'tf32': True}
        """
        try:
            call: Any = ast.parse(f"f({self.trainer or ''})", mode="eval").body
            if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
                raise ValueError("no keyword arguments alone")
            if any(each.arg is None for each in call.keywords):
                raise ValueError("arguments of a mapping")
            return {str(each.arg): ast.literal_eval(each.value) for each in call.keywords}
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            raise ValueError(
                f"{str(self.trainer)[:60]!r} are no keyword arguments with plain values"
            ) from None
