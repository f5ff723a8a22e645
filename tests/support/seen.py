"""What a step saw, told to a test from inside of a run."""

from __future__ import annotations

from typing import Any


class Seen(list[Any]):
    """A list that the runs of a test share; a plain one is copied for each run, and is lost."""

    def __deepcopy__(self, memo: Any) -> Seen:
        return self
