"""What `autobatch doctor` looks at: versions, cards, settings, libraries, folders, a simulation.

Invariant: looking changes nothing, and whatever fails is a finding.
"""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from autobatch._version import __version__
from autobatch.errors import AutobatchError, UsageError
from autobatch.records.codec import dump_json, encode
from autobatch.support.installing import install_line
from autobatch.support.units import format_bytes, format_seconds
from autobatch.support.wording import count, one_line

__all__ = ["Checkup", "Finding", "checkup"]

_SCHEMA_VERSION = 1
_PACKAGE = "autobatch-gpu"
_FOR_DEVELOPERS = frozenset({"examples", "lint", "test"})
_TESTED_BYTES = (64 * 8 + 8) * 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        section: what it belongs to.
        name: what it is.
        value: what was found.
        verdict: "ok"; "note" for what is missing without being needed, or worth a look; "problem"
            for what has to be changed before autobatch works.
        advice: what to do about it; empty where there is nothing to do.
    """

    section: str
    name: str
    value: str
    verdict: Literal["ok", "note", "problem"] = "ok"
    advice: str = ""

    @property
    def installs(self) -> bool:
        """Whether the advice is a command that installs something."""
        return self.advice.startswith("pip install")


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkup:
    """All that was found, section by section."""

    findings: tuple[Finding, ...]

    @property
    def problems(self) -> tuple[Finding, ...]:
        """What has to be changed."""
        return tuple(each for each in self.findings if each.verdict == "problem")

    def to_json(self) -> str:
        """Render what was found as JSON text."""
        healthy = not self.problems
        return dump_json({"schema_version": _SCHEMA_VERSION, "healthy": healthy} | encode(self))


def checkup() -> Checkup:
    """Look at everything; it takes as long as importing PyTorch, and a simulation of a second."""
    parts = (_versions, _cards, _allocator, _libraries, _folders, _simulation)
    return Checkup(findings=tuple(finding for part in parts for finding in part()))


def _versions() -> Iterator[Finding]:
    section = "Versions"
    yield Finding(section=section, name="autobatch", value=__version__)
    yield Finding(section=section, name="Python", value=platform.python_version())
    yield Finding(section=section, name="platform", value=platform.platform())
    yield from _torch(section)


def _torch(section: str) -> Iterator[Finding]:
    try:
        import torch
    except Exception as error:
        yield Finding(
            section=section,
            name="torch",
            value=one_line(error),
            verdict="problem",
            advice="install PyTorch as https://pytorch.org/get-started says",
        )
        return
    cuda = torch.version.cuda
    build = f"built for CUDA {cuda}" if cuda else "built without CUDA"
    yield Finding(section=section, name="torch", value=f"{torch.__version__}, {build}")


def _cards() -> Iterator[Finding]:
    from autobatch.gpus.catalogue import CATALOGUE
    from autobatch.gpus.nvml import driver_version, installed_gpus

    section = "GPUs"
    cards, driver = installed_gpus(), driver_version()
    yield Finding(section=section, name="driver", value=driver or "none of NVIDIA's was found")
    for card in cards:
        memory = "" if card.total_bytes is None else f", {format_bytes(card.total_bytes)}"
        yield Finding(section=section, name=f"cuda:{card.index}", value=f"{card.name}{memory}")
    seen = _cards_of_torch()
    if seen:
        yield Finding(
            section=section,
            name="PyTorch",
            value=f"can use {count(seen, 'GPU')}: `autobatch probe` without --gpu measures there",
        )
    elif cards:
        yield Finding(
            section=section,
            name="PyTorch",
            value="can use none of them",
            verdict="problem",
            advice="install a CUDA build of PyTorch that this driver is new enough for "
            "(https://pytorch.org/get-started), and look at CUDA_VISIBLE_DEVICES",
        )
    where = "every GPU is, and nothing is measured here" if not seen else "GPUs named by --gpu are"
    yield Finding(
        section=section,
        name="simulated",
        value=f"{where}: {len(CATALOGUE)} by name (`autobatch gpus`), any other by its size",
    )


def _cards_of_torch() -> int:
    try:
        import torch

        return torch.cuda.device_count() if torch.cuda.is_available() else 0
    except Exception:  # told of the versions
        return 0


def _allocator() -> Iterator[Finding]:
    from autobatch.memory.allocator_settings import VARIABLES, AllocatorSettings

    section = "Allocator settings of the environment"
    named = {name: os.environ[name] for name in VARIABLES if os.environ.get(name)}
    if not named:
        yield Finding(section=section, name="settings", value="none: PyTorch's defaults")
        return
    for at, (name, text) in enumerate(named.items()):
        if at:
            first = next(iter(named))
            yield Finding(
                section=section,
                name=name,
                value=text,
                verdict="note",
                advice=f"{first} is set, too, and counts: unset one of them",
            )
            continue
        try:
            settings = AllocatorSettings.parse(text).require_known()
        except UsageError as error:
            yield Finding(
                section=section, name=name, value=text, verdict="problem", advice=str(error)
            )
            continue
        unknown = ", ".join(settings.unknown)
        yield Finding(
            section=section,
            name=name,
            value=text,
            verdict="note" if unknown else "ok",
            advice=f"not simulated, as it does not bear on memory here: {unknown}" * bool(unknown),
        )


def _libraries() -> Iterator[Finding]:
    """Yield which libraries are missing: of the package itself, and of each extra."""
    from packaging.requirements import Requirement

    try:
        declared = [Requirement(text) for text in metadata.requires(_PACKAGE) or ()]
        extras = metadata.metadata(_PACKAGE).get_all("Provides-Extra") or []
    except metadata.PackageNotFoundError:
        yield Finding(
            section="Libraries",
            name=_PACKAGE,
            value="runs from its source folder, without being installed",
            verdict="note",
            advice=f"{install_line()} also installs what it needs",
        )
        return
    wanted = sorted(extra for extra in extras if extra not in _FOR_DEVELOPERS)
    for extra in ("", *wanted):
        needed = [
            requirement
            for requirement in declared
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra})
        ]
        if extra:
            needed = [requirement for requirement in needed if requirement.marker is not None]
        found = {one.name: _version(one.name) for one in needed}
        wrong = [
            one.name if found[one.name] is None else f"{one.name}{one.specifier}"
            for one in needed
            if found[one.name] is None or not one.specifier.contains(found[one.name] or "", True)
        ]
        verdict: Literal["ok", "note", "problem"] = "note" if extra else "problem"
        here = ", ".join(f"{name} {version}" for name, version in found.items() if version)
        missing = f"missing: {', '.join(wrong)}"
        yield Finding(
            section="Libraries",
            name=f"extra {extra}" if extra else "needed",
            value=missing if wrong else here,
            verdict=verdict if wrong else "ok",
            advice=install_line(extra) if wrong else "",
        )


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _folders() -> Iterator[Finding]:
    from autobatch.support.files import user_folder

    section = "Folders"
    advice = "set AUTOBATCH_CACHE_DIR to a folder that can be written; without one nothing is kept"
    try:
        folder = user_folder()
    except RuntimeError as error:
        yield Finding(
            section=section, name="cache", value=one_line(error), verdict="note", advice=advice
        )
        return
    plans = len(list((folder / "plans").glob("*.json")))
    value = f"{folder}: {format_bytes(_size_of(folder))}, {count(plans, 'plan')}"
    existing = next(each for each in (folder, *folder.parents) if each.exists())
    writable = os.access(existing, os.W_OK)
    yield Finding(
        section=section,
        name="cache",
        value=value if writable else f"{value}, cannot be written",
        verdict="ok" if writable else "note",
        advice="" if writable else advice,
    )


def _size_of(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        with suppress(OSError):  # a file has gone since
            total += sum(os.lstat(os.path.join(parent, name)).st_size for name in names)
    return total


def _simulation() -> Iterator[Finding]:
    """Yield whether a small simulation gives the right number."""
    section, name = "Simulation", "two windows of a linear layer on a T4"
    try:
        from torch import nn

        from autobatch.memory import allocator
        from autobatch.tuning.tuner import predict

        started = time.perf_counter()
        footprint = predict(nn.Linear(64, 8), micro_batch=4, gpu="t4")
    except (AutobatchError, ImportError, RuntimeError) as error:
        yield Finding(
            section=section,
            name=name,
            value=one_line(error),
            verdict="problem",
            advice="see that torch is a version that autobatch supports, and tell its authors",
        )
        return
    took = format_seconds(time.perf_counter() - started)
    right = footprint.parameters_bytes == _TESTED_BYTES
    counted = f"{footprint.parameters_bytes:,} bytes of parameters"
    yield Finding(
        section=section,
        name=name,
        value=f"works, in {took}" if right else f"{counted}, and there are {_TESTED_BYTES:,}",
        verdict="ok" if right else "problem",
        advice="" if right else f"tell its authors, with Python {sys.version.split()[0]}",
    )
    is_python = allocator.__file__.endswith(".py")
    yield Finding(
        section=section,
        name="the simulated allocator",
        value="runs as Python" if is_python else "is compiled",
        verdict="note" if is_python else "ok",
        advice="answers are the same and come later; with a C compiler, install autobatch again"
        if is_python
        else "",
    )
