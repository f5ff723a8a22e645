"""Plans that were made before, so that the same question is answered in milliseconds.

Invariant: two questions share a key only if nothing that a plan depends on tells them apart. What
cannot be described so that another process would agree makes its key unique: a stale plan is far
worse than one made again.
"""

from __future__ import annotations

import functools
import os
import platform
import secrets
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from types import FunctionType
from typing import Any

from autobatch.errors import FileError
from autobatch.gpus.catalogue import GpuSpec
from autobatch.plan.plan import Plan
from autobatch.records.codec import RecordError
from autobatch.support.randomness import random_state_kept
from autobatch.tuning.fingerprint import digest, surroundings
from autobatch.workload.workload import Workload

__all__ = ["find", "folder", "plan_key", "store"]

ENTRIES_KEPT = 200

# No SHA-256 begins like this: keys of workloads that cannot be described, never to be stored.
_UNIQUE = "0" * 32


def folder() -> Path:
    """Return where plans are kept: `$AUTOBATCH_CACHE_DIR`, or the user's cache folder.

    Raises:
        RuntimeError: the user has no home folder.
    """
    if chosen := os.environ.get("AUTOBATCH_CACHE_DIR"):
        return Path(chosen)
    system = platform.system()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        base = Path(shared)
    elif system == "Windows" and (local := os.environ.get("LOCALAPPDATA")):
        base = Path(local)
    else:
        base = Path.home() / ("Library/Caches" if system == "Darwin" else ".cache")
    return base / "autobatch" / "plans"


def find(key: str) -> Plan | None:
    """Return the plan stored under a key; None, and no broken file, where there is none."""
    try:
        file = folder() / f"{key}.json"
    except RuntimeError:
        return None
    try:
        plan = Plan.load(file)
    except FileError:
        with suppress(OSError):
            file.unlink(missing_ok=True)
        return None
    with suppress(OSError):
        os.utime(file)
    return plan


def store(key: str, plan: Plan) -> None:
    """Keep a plan under its key, and the 200 most recently used in all; silent where it cannot."""
    if key.startswith(_UNIQUE):
        return
    with suppress(FileError, OSError, RecordError, RuntimeError):
        home = folder()
        home.mkdir(parents=True, exist_ok=True)
        stored = plan.save(home / f"{key}.json")
        others = sorted(
            (file for file in home.glob("*.json") if file != stored), key=_used, reverse=True
        )
        for file in others[ENTRIES_KEPT - 1 :]:
            file.unlink(missing_ok=True)


def _used(file: Path) -> int:
    try:
        return file.stat().st_mtime_ns
    except FileNotFoundError:  # another process dropped it
        return 0


def plan_key(workload: Workload, gpu: GpuSpec, options: Mapping[str, object]) -> str:
    """Return a SHA-256 in hexadecimal of everything that a plan depends on.

    Covers the model's structure, the code of the user's own classes and functions with the globals
    they use, shapes and dtypes, the optimizer, one batch of two samples, the GPU, torch's switches,
    versions, environment settings and the user's loaded source files. Values of tensors, devices,
    train/eval mode and random state do not count.

    Args:
        workload: what would run; `workload.batch(2)` is called with the random state kept.
        gpu: the card; the sources of its figures do not count.
        options: whatever else decides the answer, such as the target; plain values.
    """
    try:
        with random_state_kept():
            question = (
                workload.model,  # first, so that its parameters number the others
                workload.batch(2),
                _code(workload.batch),
                _fields(workload, without=("model", "batch")),
                _fields(gpu, without=("sources",)),
                sorted(options.items()),
                surroundings(),
            )
            return digest(question)
    except Exception:  # whatever the user's objects raise, the tuner will meet it and say so
        return _UNIQUE + secrets.token_hex(16)


def _code(batch: Callable[[int], Any]) -> object:
    """Return the code that makes batches, which may do otherwise for more samples, without data."""
    while isinstance(batch, functools.partial):
        batch = batch.func
    function = getattr(batch, "__func__", batch)
    return function.__code__ if isinstance(function, FunctionType) else type(function)


def _fields(record: Workload | GpuSpec, without: tuple[str, ...]) -> dict[str, object]:
    names = (field.name for field in fields(record) if field.name not in without)
    return {name: getattr(record, name) for name in names}
