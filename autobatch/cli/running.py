"""From a command's arguments to work in a process of its own, and to its answer."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from autobatch.cli.training import Training, training_of

if TYPE_CHECKING:
    from torch import nn

    from autobatch.devices.choose import Gpu
    from autobatch.gpus.catalogue import GpuSpec
    from autobatch.records.progress import ProgressCallback
    from autobatch.report.document import Document
    from autobatch.report.own_files import Report
    from autobatch.workload.workload import Workload

__all__ = [
    "following",
    "model_of",
    "named_gpu",
    "opened",
    "outputs",
    "run_apart",
    "show_answer",
    "sized_model_of",
    "subject",
    "tell",
    "workload_options",
]

T = TypeVar("T")

Answer = Any
"""What a command found: it has `to_json`, and `report` where the command has that option."""

Model = Callable[..., "nn.Module | Workload"]
"""Makes what is trained, in the process that runs it."""


@contextmanager
def outputs(arguments: argparse.Namespace, report: Report | None = None) -> Iterator[None]:
    """Prove that an answer can be written to where it was asked for, before any work.

    Args:
        arguments: of the command.
        report: which one it writes, where it has that option.

    Raises:
        FileError: a file or the report's folder cannot be written, or holds files of others that
            the report would replace.
    """
    from autobatch.support.files import check_writable, prepared_folder

    folder = getattr(arguments, "report", None)
    if folder and report:
        from autobatch.report.own_files import refuse_files_of_others

        refuse_files_of_others(report, folder)
    with prepared_folder(folder) if folder else nullcontext():
        if arguments.json and arguments.json != "-":
            check_writable(arguments.json)
        yield


def following(
    arguments: argparse.Namespace, *, many: bool = False
) -> AbstractContextManager[ProgressCallback]:
    """Show progress on stderr for as long as the block runs; none where only the answer counts.

    Args:
        arguments: of the command.
        many: whether the work has many steps, and a bar suits it.
    """
    from autobatch.cli.terminal import follow, follow_all
    from autobatch.records.progress import silent

    if arguments.quiet:
        return nullcontext(silent)
    if arguments.verbose:
        return follow(sys.stderr, keeps=True)
    return follow_all(sys.stderr) if many else follow(sys.stderr)


def tell(arguments: argparse.Namespace, answer: Answer, document: Document) -> None:
    """Show an answer, or print it as JSON; write it, and its report, where they were asked for.

    Raises:
        OSError: it cannot be shown, because nobody reads it, say; what was asked for is written.
    """
    unseen: OSError | None = None
    try:
        if arguments.json == "-":
            sys.stdout.write(answer.to_json())
        else:
            show_answer(arguments, document)
        sys.stdout.flush()
    except OSError as error:
        unseen = error
    page = _written(arguments, answer)
    if unseen is not None:
        raise unseen
    if page is None:
        return
    if not arguments.quiet:
        print(f"report: {page}", file=sys.stderr if arguments.json == "-" else sys.stdout)
    if arguments.open:
        opened(page)


def _written(arguments: argparse.Namespace, answer: Answer) -> Path | None:
    """Write an answer to where it was asked for, and return the page of its report."""
    from autobatch.support.files import write_text

    if arguments.json and arguments.json != "-":
        write_text(arguments.json, answer.to_json())
    folder = getattr(arguments, "report", None)
    if folder or getattr(arguments, "open", False):
        return answer.report(folder or _temporary_folder())  # type: ignore[no-any-return]
    return None


def _temporary_folder() -> str:
    import tempfile

    return tempfile.mkdtemp(prefix="autobatch-report-")


def show_answer(arguments: argparse.Namespace, document: Document) -> None:
    """Show a document on stdout, or its first line where no more is wanted."""
    if arguments.quiet:
        print(document.title)
        return
    from autobatch.cli.terminal import show

    show(document, sys.stdout)


def opened(page: Path) -> None:
    """Open a report in the user's browser, and say so where there is none."""
    import webbrowser

    if not webbrowser.open(page.resolve().as_uri()):
        print(f"no browser was found here: open {page} in one", file=sys.stderr)


def run_apart(
    arguments: argparse.Namespace, work: Callable[..., T], progress: ProgressCallback, **limits: Any
) -> T:
    """Run work that calls the user's code in a child process, where it can do no harm.

    What it prints, here or there, goes to stderr: stdout is for the answer.
    """
    aloud = arguments.verbose or arguments.debug
    work = partial(_as_asked, work, training_of(arguments), arguments.debug, aloud)
    if arguments.no_isolate:
        with _printing_to_stderr():
            return work(progress=progress)
    from autobatch.tuning.isolation import apart

    return apart(work, progress=progress, **limits)


def _as_asked(
    work: Callable[..., T],
    training: Training,
    debug: bool,
    aloud: bool,
    *,
    progress: ProgressCallback,
) -> T:
    """Do work with the settings of the process that were asked for."""
    with (
        training.in_force(),
        nullcontext() if aloud else _without_remarks(),
        _debugged() if debug else nullcontext(),
    ):
        return work(progress=progress)


@contextmanager
def _without_remarks() -> Iterator[None]:
    """Let Transformers log errors alone, unless the user chose what it logs.

    Its remarks on each configuration are about runs that do not take place here.
    """
    name = "TRANSFORMERS_VERBOSITY"
    chosen = os.environ.get(name)
    os.environ.setdefault(name, "error")
    try:
        yield
    finally:
        if chosen is None:
            del os.environ[name]


@contextmanager
def _debugged() -> Iterator[None]:
    """Let libraries warn, and show where an error comes from, which its message does not say."""
    import traceback
    import warnings

    import torch

    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            yield
    except Exception:
        traceback.print_exc()
        raise
    finally:
        torch.set_warn_always(before)


@contextmanager
def _printing_to_stderr() -> Iterator[None]:
    """Send to stderr what the block prints, by whatever way: also from C, and from its children."""
    import ctypes

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


def model_of(arguments: argparse.Namespace, gpus: Sequence[Gpu]) -> Model:
    """Return what makes the model or Workload of a SPEC, trained as the command says.

    Args:
        arguments: of the command.
        gpus: the cards that it is trained on.

    Raises:
        UsageError: an option of the training cannot be understood.
    """
    training = training_of(arguments)
    if training.says_nothing and not arguments.verbose:
        return partial(subject, arguments.spec)
    make = partial(subject, arguments.spec)
    return partial(_trained, make, training, tuple(gpus), arguments.verbose)


def sized_model_of(arguments: argparse.Namespace, name: str, gpus: Sequence[Gpu]) -> Model:
    """Return a function from a parameter's value to the model of the SPEC."""
    return partial(_sized, arguments.spec, name, training_of(arguments), tuple(gpus))


def subject(spec: str) -> nn.Module | Workload:
    """Return what a SPEC names."""
    from autobatch.workload.spec.load import load_spec

    return load_spec(spec)


def _sized(
    spec: str, name: str, training: Training, gpus: Sequence[Gpu], value: int
) -> nn.Module | Workload:
    from autobatch.workload.spec.load import load_sized

    make = partial(load_sized, spec, name, value)
    return make() if training.says_nothing else _trained(make, training, gpus, False)


def _trained(make: Model, training: Training, gpus: Sequence[Gpu], aloud: bool) -> Workload:
    """Return a workload that is trained as the command says; `aloud` tells what it is."""
    from autobatch.devices.choose import described

    workload = training.of(make(), [described(gpu) for gpu in gpus])
    if aloud:
        _describe(workload)
    return workload


def _describe(workload: Workload) -> None:
    """Say on stderr what is trained, on which batches."""
    from autobatch.support.randomness import random_state_kept
    from autobatch.support.wording import count
    from autobatch.workload.sample import named_tensors

    with random_state_kept():
        batch = workload.batch(2)
    shapes = [
        f"{'.'.join(path)} {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}".strip()
        for path, tensor in named_tensors(batch).items()
    ]
    parameters = sum(parameter.numel() for parameter in workload.model.parameters())
    model = f"{type(workload.model).__name__}, {count(parameters, 'parameter')}"
    print(f"  model: {model}", file=sys.stderr)
    print(f"  two samples: {', '.join(shapes)}", file=sys.stderr, flush=True)


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
