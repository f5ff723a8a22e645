"""What is tried: every model name of timm and every model type of transformers.

Invariant: a key names one subject, today and in an older journal.
"""

from __future__ import annotations

import fnmatch
import importlib
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from reports.common.journal import Record

Library = Literal["timm", "transformers"]
LIBRARIES: tuple[Library, ...] = get_args(Library)


@dataclass(frozen=True, slots=True)
class Subject:
    """A model of timm, or a model type of transformers."""

    library: Library
    name: str

    @property
    def key(self) -> str:
        """Name it in journals."""
        return f"{self.library}:{self.name}"


def subjects_of(library: Library) -> list[Subject]:
    """List a library's subjects, in its own order."""
    list_names = {"timm": _timm_names, "transformers": _transformers_types}[library]
    return [Subject(library, name) for name in list_names()]


def _timm_names() -> list[str]:
    logging.getLogger("timm").setLevel(logging.ERROR)
    names: list[str] = importlib.import_module("timm").list_models()
    return names


def _transformers_types() -> list[str]:
    home = importlib.import_module("transformers.models.auto.configuration_auto")
    return list(home.CONFIG_MAPPING_NAMES)


def selected(
    subjects: Iterable[Subject], *, only: Library | None = None, match: str | None = None
) -> list[Subject]:
    """Return the subjects of a library, or those whose name matches a pattern of a shell."""
    return [
        subject
        for subject in subjects
        if only in (None, subject.library) and fnmatch.fnmatchcase(subject.name, match or "*")
    ]


def tasks_of(subjects: Iterable[Subject]) -> list[Record]:
    """Make a worker's task of each subject."""
    return [
        {"library": subject.library, "name": subject.name, "keys": [subject.key]}
        for subject in subjects
    ]
