"""The answer of `compare`, as users hold it.

Invariant: it saves as JSON and loads back equal, without its plans, which have files of their own.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from autobatch.errors import FileError, UsageError
from autobatch.gpus.catalogue import find_gpu
from autobatch.plan.plan import Plan
from autobatch.records.codec import RecordError
from autobatch.records.comparison import ComparisonRecord, read_record, write_record
from autobatch.support.files import read_text, write_text
from autobatch.support.wording import count

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Comparison"]

_FILE_LIMIT_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison(ComparisonRecord):
    """The same training on several cards; what can be done with the answer.

    The fields are those of `ComparisonRecord`.

    Attributes:
        plans: what `tune` would give, by name of the card; of a comparison that was loaded, none.
    """

    plans: Mapping[str, Plan] = field(default_factory=dict, compare=False, repr=False)

    def plan(self, gpu: str) -> Plan:
        """Return the plan for one of the cards.

        Raises:
            UsageError: the card was not compared, nothing fits on it, or the comparison was loaded.
        """
        named = [card.gpu.name for card in self.cards]
        name = gpu if gpu in named else find_gpu(gpu).name
        if name in self.plans:
            return self.plans[name]
        if name not in named:
            raise UsageError(f"{name} was not compared: there are {', '.join(named)}")
        raise UsageError(
            f"there is no plan for {name}: nothing fits on it"
            if self.plans or not self.fitting
            else f"a comparison that was loaded has no plans: call autobatch.tune(…, gpu={name!r})"
        )

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the comparison as JSON, without its plans, and return the path.

        Raises:
            FileError: the file cannot be written.
        """
        return write_text(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Comparison:
        """Read a comparison that `save` wrote; it equals the one that was saved.

        Raises:
            FileError: the file cannot be read, or holds no comparison of this schema.
        """
        text = read_text(path, limit_bytes=_FILE_LIMIT_BYTES)
        try:
            return cls(**read_record(ComparisonRecord, text))
        except RecordError as error:
            raise FileError(f"{os.fspath(path)!r} is not a comparison: {error}") from error

    def to_json(self) -> str:
        """Render the comparison as JSON text, without its plans."""
        return write_record(ComparisonRecord, self)

    def to_frame(self) -> pd.DataFrame:
        """Return a data frame of one row per card."""
        from autobatch.report.table import comparison

        return comparison(self)

    def report(self, folder: str | os.PathLike[str]) -> Path:
        """Write report.html, report.md, comparison.json, comparison.csv and a chart into a folder.

        Raises:
            FileError: the folder cannot be written.
        """
        from autobatch.report.choices import write_comparison

        return write_comparison(self, folder)

    def __repr__(self) -> str:
        """Name the answer; `print(comparison)` shows the whole."""
        return (
            f"<Comparison of {self.model} on {count(len(self.cards), 'card')}, "
            f"{len(self.fitting)} of which can train {count(self.target, 'sample')} an update, "
            "simulated>"
        )

    def __str__(self) -> str:
        """Render the comparison as plain text."""
        from autobatch.report.comparison import comparison_document
        from autobatch.report.text import render

        return render(comparison_document(self))
