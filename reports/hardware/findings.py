"""What one child process has found out, on disk after every stage.

Invariant: whatever ends the process, the file holds what was known before; a stage that fails is
named with its error, and the next one runs.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from reports.common.results import one_line


class Findings:
    """Facts by name, saved as JSON."""

    def __init__(self, path: Path):
        self.path = path
        self.facts: dict[str, Any] = {"stage": None, "stage_seconds": {}, "errors": []}

    def __setitem__(self, name: str, value: Any) -> None:
        self.facts[name] = value

    def __getitem__(self, name: str) -> Any:
        return self.facts[name]

    def save(self) -> None:
        whole = self.path.with_suffix(".new")
        whole.write_text(json.dumps(self.facts))
        os.replace(whole, self.path)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Note that a stage begins, how long it took, and the error that ended it, if any."""
        started = time.perf_counter()
        self["stage"] = name
        self.save()
        try:
            yield
        except Exception as error:
            self["errors"].append(
                {
                    "stage": name,
                    "error": one_line(error),
                    "traceback": traceback.format_exc().splitlines()[-30:],
                }
            )
        self["stage_seconds"][name] = time.perf_counter() - started
        self["stage"] = None
        self.save()

    def failed(self, stage: str) -> bool:
        return any(error["stage"] == stage for error in self["errors"])
