"""The answer of `vary`, as users hold it.

Invariant: it saves as JSON and loads back equal, without its plans, which have files of their own.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from autobatch.errors import FileError, UsageError
from autobatch.plan.plan import Plan
from autobatch.records.codec import RecordError
from autobatch.records.comparison import FrontierRecord, read_record, write_record
from autobatch.support.files import read_text, write_text

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Frontier"]

_FILE_LIMIT_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Frontier(FrontierRecord):
    """The micro-batch along a parameter; what can be done with it.

    The fields are those of `FrontierRecord`.

    Attributes:
        plans: what `tune` would give, by value of the parameter; of a frontier that was loaded,
            none.
    """

    plans: Mapping[int, Plan] = field(default_factory=dict, compare=False, repr=False)

    def buckets(self) -> dict[int, int]:
        """Return the micro-batch for each value, for a loader that batches samples of like length.

        A sample goes into the smallest bucket that holds it. Micro-batches of all buckets were
        simulated in one run, mixed, because blocks that the allocator keeps of short ones are too
        small for longer ones: where they do not fit together, all of them are smaller than alone.

        Raises:
            UsageError: the model is another one for each value, or fewer than two of them fit.
        """
        found = {point.value: point.bucket for point in self.points if point.bucket is not None}
        if not found:
            raise UsageError(
                f"there are no buckets along {self.parameter}: they need one model that trains on "
                "batches of at least two sizes, which fit; see the warnings of the frontier"
            )
        return found

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the frontier as JSON, without its plans, and return the path.

        Raises:
            FileError: the file cannot be written.
        """
        return write_text(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Frontier:
        """Read a frontier that `save` wrote; it equals the one that was saved.

        Raises:
            FileError: the file cannot be read, or holds no frontier of this schema.
        """
        text = read_text(path, limit_bytes=_FILE_LIMIT_BYTES)
        try:
            return cls(**read_record(FrontierRecord, text))
        except RecordError as error:
            raise FileError(f"{os.fspath(path)!r} is not a frontier: {error}") from error

    def to_json(self) -> str:
        """Render the frontier as JSON text, without its plans."""
        return write_record(FrontierRecord, self)

    def to_frame(self) -> pd.DataFrame:
        """Return a data frame of one row per value."""
        from autobatch.report.table import frontier

        return frontier(self)

    def report(self, folder: str | os.PathLike[str]) -> Path:
        """Write report.html, report.md, frontier.json, frontier.csv and a chart into a folder.

        Returns:
            The path of report.html.

        Raises:
            FileError: the folder cannot be written.
        """
        from autobatch.report.choices import write_frontier

        return write_frontier(self, folder)

    def __repr__(self) -> str:
        """Name the answer; `print(frontier)` shows the whole."""
        fitting = ", ".join(
            f"{point.value}: {point.outcome.micro_batch}"
            for point in self.points
            if point.outcome.fits
        )
        return (
            f"<Frontier of {self.model} on {self.gpu.name}: micro-batch by {self.parameter} "
            f"{{{fitting}}}>"
        )

    def __str__(self) -> str:
        """Render the frontier as plain text."""
        from autobatch.report.comparison import frontier_document
        from autobatch.report.text import render

        return render(frontier_document(self))
