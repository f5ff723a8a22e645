"""The records of a run on disk, one line of JSON each, so that a run cut short can go on.

Invariant: a line that was only half written is as if it had never been.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

from reports.accuracy.tables import Record


def read_journal(path: Path) -> dict[str, Record]:
    """Return the records by key."""
    records: dict[str, Record] = {}
    if path.exists():
        for line in path.read_text().splitlines():
            with suppress(json.JSONDecodeError):
                record = json.loads(line)
                records[record["key"]] = record
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
