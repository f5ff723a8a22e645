"""The answer of `sweep`, as users hold it.

Invariant: it saves as JSON with every trial that was looked at, whatever became of it.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from autobatch import _version
from autobatch.plan.plan import Plan
from autobatch.records.codec import dump_json, encode
from autobatch.records.plan_json import SCHEMA_VERSION
from autobatch.records.sweep import SweepRecord
from autobatch.support.files import write_text

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Sweep"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep(SweepRecord):
    """What a sweep found, and the plan of the best; the fields are those of `SweepRecord`.

    Attributes:
        plan: of the fastest configuration, whose levers are to be applied as `code` says.
    """

    plan: Plan

    def to_json(self) -> str:
        """Render all trials, the front and the plan as JSON text."""
        record = {
            each.name: encode(getattr(self, each.name))
            for each in fields(self)
            if each.name != "plan"
        }
        header = {
            "schema_version": SCHEMA_VERSION,
            "autobatch": _version.__version__,
            "best": encode(self.best),
            "front": [trial.number for trial in self.front],
            "executions": self.executions,
        }
        return dump_json(header | record | {"plan": json.loads(self.plan.to_json())})

    def to_frame(self) -> pd.DataFrame:
        """Return the trials as a data frame: a row each, with a column for each lever."""
        from autobatch.report.table import sweep_trials

        return sweep_trials(self)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write `to_json` into a file, whole or not at all, and return the path.

        Raises:
            FileError: the file cannot be written.
        """
        return write_text(path, self.to_json())

    def report(self, folder: str | os.PathLike[str]) -> Path:
        """Write report.html, report.md, sweep.json, plan.json, trials.csv and the chart.

        Returns:
            The path of report.html.

        Raises:
            FileError: the folder cannot be written.
        """
        from autobatch.report.sweep import write_sweep

        return write_sweep(
            self, folder, {"sweep.json": self.to_json(), "plan.json": self.plan.to_json()}
        )

    def __repr__(self) -> str:
        """Name the answer; `print(sweep)` shows the whole."""
        return (
            f"<Sweep of {self.model} on {self.gpu}: {len(self.trials)} configurations, fastest "
            f"{self.best.label} at micro-batch {self.best.micro_batch:,}>"
        )

    def __str__(self) -> str:
        """Render the sweep as plain text, the answer first."""
        from autobatch.report.sweep import sweep_summary
        from autobatch.report.text import render

        return render(sweep_summary(self))
