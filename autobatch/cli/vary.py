"""The command `vary`, and the option `--vary`: the micro-batch along a parameter of a SPEC."""

from __future__ import annotations

import argparse
from functools import partial
from typing import TYPE_CHECKING, Any

from autobatch.cli.options import (
    add_objective,
    add_question,
    add_report,
    add_time_limit,
    add_verb,
    add_workload_options,
)
from autobatch.cli.running import (
    Model,
    following,
    named_gpu,
    outputs,
    run_apart,
    sized_model_of,
    tell,
    workload_options,
)
from autobatch.errors import DoesNotFitError, UsageError

if TYPE_CHECKING:
    from autobatch.choosing.frontier import Frontier
    from autobatch.records.progress import ProgressCallback

__all__ = ["add", "add_option", "run"]


def add(verbs: Any) -> None:
    """Add the command to a parser's sub-parsers."""
    parser = add_verb(
        verbs,
        "vary",
        run,
        usage="SPEC --target N --vary NAME=N,N [options]",
        help="find the micro-batch along a parameter of the SPEC, such as seq or img_size",
        description="Plan a run for each value of a parameter of the SPEC: the largest "
        "micro-batch, its throughput (an estimate on a simulated GPU), and a bucket table for a "
        "loader.",
        examples=[
            "vary hf:gpt2 --vary seq=512,1024,2048 --target 64 --gpu a100-40gb",
            "vary train.py:build --vary width=256,512 --target 128 --gpu t4 --report out",
        ],
    )
    add_question(parser, headroom="as of `autobatch probe`")
    add_option(parser, required=True)
    add_objective(parser)
    add_workload_options(parser, inputs=False)
    add_time_limit(parser)
    add_report(parser)


def add_option(parser: argparse.ArgumentParser, *, required: bool = False) -> None:
    """Add the option that says what varies; `run` takes the arguments of a parser that has it."""
    parser.add_argument(
        "--vary",
        required=required,
        metavar="NAME=N,N",
        help="a parameter and its values, such as seq=512,1024,2048: of a library's SPEC any whole "
        "number, of file.py:function an argument of the function",
    )


def run(arguments: argparse.Namespace) -> int:
    """Find the micro-batch for each value, and show the table.

    The code of `DoesNotFitError` is returned where no value fits.
    It takes the arguments of `vary`, or those of `probe` with the option that `add_option` adds.
    """
    from autobatch.gpus.catalogue import is_device
    from autobatch.report.comparison import frontier_document

    with outputs(arguments, "frontier"):
        name, values = _parameter(arguments.vary)
        if getattr(arguments, "prove", False):
            raise UsageError("--prove runs the size above one ceiling: leave it out with --vary")
        if getattr(arguments, "input_shape", None) or getattr(arguments, "sample", None):
            raise UsageError(
                "--input-shape and --sample are of one size: leave them out with --vary, and let "
                "the function return an autobatch.Workload that makes its batches"
            )
        gpu = named_gpu(arguments)
        options = {
            "values": values,
            "name": name,
            "target": arguments.target,
            "gpu": gpu,
            "objective": arguments.objective,
            "headroom": arguments.headroom,
            **workload_options(arguments),
        }
        on_gpu = is_device(gpu)
        build = sized_model_of(arguments, name, [gpu])
        with following(arguments) as progress:
            found = run_apart(
                arguments,
                partial(_vary, build, options),
                progress,
                time_limit=arguments.time_limit if on_gpu else None,
                on_gpu=on_gpu,
            )
        tell(arguments, found, frontier_document(found))
    fits = any(point.outcome.fits for point in found.points)
    return 0 if fits else DoesNotFitError.exit_code


def _vary(build: Model, options: dict[str, Any], *, progress: ProgressCallback) -> Frontier:
    from autobatch.choosing.vary import vary

    return vary(build, progress=progress, **options)


def _parameter(text: str) -> tuple[str, tuple[int, ...]]:
    """Return the name of a parameter and its values, the smallest first.

    Raises:
        UsageError: it is not written NAME=N,N, or a value is none, or given twice.

    >>> _parameter("seq=1024,512")
    ('seq', (512, 1024))
    """
    from autobatch.choosing.values import whole_values

    name, equals, listed = text.partition("=")
    name = name.strip()
    if not equals or not name.isidentifier():
        raise UsageError(f"--vary is {text!r}: write NAME=N,N, such as seq=512,1024")
    parts = [part.strip() for part in listed.split(",") if part.strip()]
    values = [int(part) if part.isdecimal() else part for part in parts]  # text is refused by name
    return name, whole_values(values)
