"""What the files of every report hold beside its figures: versions, the date, rows of CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from autobatch import __version__


def versions(*packages: str) -> dict[str, str | None]:
    """Return the versions of autobatch and of other packages; None for what is not installed."""
    return {"autobatch": __version__} | {name: _version(name) for name in packages}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def today() -> str:
    """Return the date in UTC, as in 2026-11-22."""
    return datetime.now(timezone.utc).date().isoformat()


def csv_text(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """Return rows as CSV; what has no column is left out."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def one_line(error: BaseException) -> str:
    """Return an error's type and the first line of its message."""
    lines = str(error).strip().splitlines() or [""]
    return " ".join(f"{type(error).__name__}: {lines[0]}".split())[:300]
