"""Plans of earlier calls, answered again while nothing that they depend on has changed.

An entry is a JSON file: the question in plain text, the user's source files that were loaded, with
their hashes, and the plan. Invariant: an entry answers only the question that it holds, word for
word, while all of those files are as they were; and a plan that is answered so has a note of it.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from autobatch.errors import FileError
from autobatch.plan.plan import Plan
from autobatch.records.codec import RecordError, dump_json, parse_json
from autobatch.support.files import read_text, user_folder, write_text
from autobatch.support.owners import is_installed
from autobatch.support.units import MIB
from autobatch.support.wording import for_reader

__all__ = ["CacheEntry", "named_entry"]

ENTRIES_KEPT = 200

_LIMIT_BYTES = 64 * MIB

_SETTINGS = ("CUBLAS", "CUDA", "CUDNN", "NVIDIA", "PYTORCH", "TORCH")
"""How the environment variables begin that PyTorch and CUDA's libraries read."""

_FOLDERS = "_DIR"
"""How those end that name a folder: they decide no memory, and PyTorch sets one as it runs."""


class CacheEntry:
    """The file that holds the answer to one question, or will."""

    def __init__(self, file: Path, question: Mapping[str, object]) -> None:
        """Name the file, and what is asked; versions and settings are added to that."""
        self._file = file
        self._question = json.loads(dump_json({**question, **_surroundings()}))

    def find(self) -> Plan | None:
        """Return the plan that answers the question; None where the file holds no such plan."""
        try:
            entry: Any = parse_json(read_text(self._file, limit_bytes=_LIMIT_BYTES))
            if entry["question"] != self._question:
                return None
            if any(_hash_of(Path(file)) != known for file, known in entry["sources"].items()):
                return None
            plan = Plan.from_json(json.dumps(entry["plan"]))
        except (FileError, RecordError, LookupError, TypeError, AttributeError):
            return None
        with suppress(OSError):
            os.utime(self._file)
        again = for_reader("probe again without cache=", "probe again with --no-cache")
        note = (
            f"answered from {str(self._file)!r}, the plan of {plan.created}: arguments, versions, "
            f"settings and your source files are the same; {again}"
        )
        return replace(plan, notes=(*plan.notes, note))

    def store(self, plan: Plan) -> None:
        """Keep a plan as the answer.

        Raises:
            FileError: the file cannot be written.
        """
        sources = {str(file): _hash_of(file) for file in _loaded_sources()}
        entry = {"question": self._question, "sources": sources, "plan": json.loads(plan.to_json())}
        write_text(self._file, dump_json(entry))


def named_entry(question: Mapping[str, object]) -> CacheEntry | None:
    """Return the entry of a question in the user's cache folder, where the latest 200 are kept.

    None where there can be no such folder.
    """
    try:
        folder = user_folder() / "plans"
        folder.mkdir(parents=True, exist_ok=True)
        files = sorted(folder.glob("*.json"), key=lambda file: file.stat().st_mtime_ns)
        for file in files[:-ENTRIES_KEPT]:
            file.unlink(missing_ok=True)
    except (OSError, RuntimeError):
        return None
    name = hashlib.sha256(dump_json(question).encode()).hexdigest()[:32]
    return CacheEntry(folder / f"{name}.json", question)


def _surroundings() -> dict[str, object]:
    """Return versions and settings that plans depend on."""
    return {
        "python": platform.python_version(),
        "packages": {found.name: found.version for found in distributions()},
        "settings": {
            name: value
            for name, value in os.environ.items()
            if name.startswith(_SETTINGS) and not name.endswith(_FOLDERS)
        },
    }


def _loaded_sources() -> Iterator[Path]:
    """Yield the files of loaded modules that belong to no installed package."""
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None) or ""
        if file.endswith(".py") and not is_installed(file):
            yield Path(file).resolve()


def _hash_of(file: Path) -> str | None:
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError:
        return None
