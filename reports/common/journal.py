"""The records of a run on disk, one line of JSON each, so that a run cut short can go on.

Invariant: a line that was only half written is as if it had never been.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from operator import itemgetter
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def read_journal(path: Path, key: Callable[[Record], Any] = itemgetter("key")) -> dict[Any, Record]:
    """Return the records of a file by key; none where there is no file."""
    records: dict[Any, Record] = {}
    if path.exists():
        for line in path.read_text().splitlines():
            with suppress(json.JSONDecodeError):
                record = json.loads(line)
                records[key(record)] = record
    return records


def append(path: Path, record: Record) -> None:
    """Add a record."""
    with path.open("a+b") as stream:
        stream.seek(0, 2)
        if stream.tell():
            stream.seek(-1, 2)
            if stream.read(1) != b"\n":
                stream.write(b"\n")
        stream.write(json.dumps(record).encode() + b"\n")
