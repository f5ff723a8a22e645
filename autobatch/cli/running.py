"""From a command's arguments to work on the user's model, in a process of its own."""

from __future__ import annotations

import argparse
import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import nn

    from autobatch.gpus.catalogue import GpuSpec
    from autobatch.records.progress import ProgressCallback
    from autobatch.report.document import Document
    from autobatch.workload.workload import Workload

__all__ = ["named_gpu", "outputs", "run_apart", "subject", "tell", "workload_options"]

T = TypeVar("T")

Answer = Any
"""What a command found: it has `to_json`, and `report` where the command has that option."""


@contextmanager
def outputs(arguments: argparse.Namespace) -> Iterator[None]:
    """Prove that an answer can be written to where it was asked for, before any work.

    Raises:
        FileError: a file or the report's folder cannot be written.
    """
    from autobatch.support.files import check_writable, prepared_folder

    folder = getattr(arguments, "report", None)
    with prepared_folder(folder) if folder else nullcontext():
        if arguments.json and arguments.json != "-":
            check_writable(arguments.json)
        yield


def tell(arguments: argparse.Namespace, answer: Answer, document: Document) -> None:
    """Show an answer, or print it as JSON; write it, and its report, where they were asked for."""
    from autobatch.cli.terminal import show
    from autobatch.support.files import write_text

    if arguments.json == "-":
        sys.stdout.write(answer.to_json())
    else:
        show(document, sys.stdout)
        if arguments.json:
            write_text(arguments.json, answer.to_json())
    if getattr(arguments, "report", None):
        page = answer.report(arguments.report)
        print(f"report: {page}", file=sys.stderr if arguments.json == "-" else sys.stdout)


def run_apart(
    arguments: argparse.Namespace, work: Callable[..., T], progress: ProgressCallback, **limits: Any
) -> T:
    """Run work that calls the user's code in a child process, where it can do no harm.

    What it prints, here or there, goes to stderr: stdout is for the answer.
    """
    if arguments.no_isolate:
        with _printing_to_stderr():
            return work(progress=progress)
    from autobatch.tuning.isolation import apart

    return apart(work, progress=progress, **limits)


@contextmanager
def _printing_to_stderr() -> Iterator[None]:
    """Send to stderr what the block prints, by whatever way: also from C, and from its children."""
    printed = sys.stdout
    printed.flush()
    kept = None
    with suppress(OSError):  # where there is no stdout or no stderr
        kept = os.dup(1)
        os.dup2(2, 1)
    sys.stdout = sys.stderr
    try:
        yield
    finally:
        sys.stdout = printed
        if kept is not None:
            with suppress(AttributeError, OSError):  # what C holds back to print at once
                ctypes.CDLL(None).fflush(None)
            os.dup2(kept, 1)
            os.close(kept)


def subject(spec: str) -> nn.Module | Workload:
    """Return what a SPEC names."""
    from autobatch.workload.spec.load import load_spec

    return load_spec(spec)


def named_gpu(arguments: argparse.Namespace) -> GpuSpec | str | None:
    """Return the card to simulate, or the device of this machine that is named."""
    from autobatch.gpus.catalogue import find_gpu, is_device

    named: str | None = arguments.gpu
    return named if named is None or is_device(named) else find_gpu(named)


def workload_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return how a workload trains, as `tune` takes it."""
    return {
        "optimizer": arguments.optimizer,
        "world_size": arguments.world_size,
        "sharding": arguments.sharding,
        "autocast": arguments.autocast,
        "clip_norm": arguments.clip_norm,
    }
