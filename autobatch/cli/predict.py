"""The command `predict`: where every byte goes at one micro-batch."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from autobatch.cli.options import SPEC_HELP, add_verb, add_workload_options
from autobatch.cli.running import (
    Model,
    following,
    model_of,
    named_gpu,
    run_apart,
    show_answer,
    workload_options,
)

if TYPE_CHECKING:
    from autobatch.records.footprint import Footprint
    from autobatch.records.progress import ProgressCallback

__all__ = ["add"]


def add(verbs: Any) -> None:
    """Add the command to a parser's sub-parsers."""
    parser = add_verb(
        verbs,
        "predict",
        _run,
        usage="SPEC --micro-batch N [options]",
        help="account for the memory of one micro-batch",
        description="Say where every byte goes at one micro-batch, whether or not it fits.",
        examples=[
            "predict hf:gpt2 --micro-batch 8 --gpu t4",
            "predict train.py:build --micro-batch 32 --gpu 24GiB --json -",
        ],
    )
    parser.add_argument("spec", metavar="SPEC", help=SPEC_HELP)
    parser.add_argument(
        "--micro-batch", type=int, required=True, metavar="N", help="samples at a time on one GPU"
    )
    parser.add_argument(
        "--accumulation-steps",
        type=int,
        default=1,
        metavar="K",
        help="micro-batches in an update (default 1)",
    )
    add_workload_options(parser)


def _run(arguments: argparse.Namespace) -> None:
    """Account for the memory of one micro-batch."""
    from autobatch.report.document import told_sections
    from autobatch.report.footprint_summary import footprint_summary
    from autobatch.support.files import check_writable, write_text

    if arguments.json and arguments.json != "-":
        check_writable(arguments.json)
    gpu = named_gpu(arguments)
    options = {
        "micro_batch": arguments.micro_batch,
        "accumulation_steps": arguments.accumulation_steps,
        "gpu": gpu,
        **workload_options(arguments),
    }
    work = partial(_footprint, model_of(arguments, [gpu]), options)
    with following(arguments) as progress:
        footprint, notes = run_apart(arguments, work, progress, on_gpu=False)
    if arguments.json == "-":
        sys.stdout.write(_footprint_json(footprint, notes))
        return
    capacity_bytes = None if gpu is None or isinstance(gpu, str) else gpu.capacity_bytes
    document = footprint_summary(footprint, capacity_bytes)
    sections = (*document.sections, *told_sections((), notes))
    show_answer(arguments, replace(document, sections=sections))
    if arguments.json:
        write_text(arguments.json, _footprint_json(footprint, notes))


def _footprint(
    model: Model, options: dict[str, Any], *, progress: ProgressCallback
) -> tuple[Footprint, tuple[str, ...]]:
    """Return the account of a micro-batch, and what is to be said of the workload."""
    from autobatch.tuning.tuner import predict

    notes: list[str] = []

    def noted() -> Any:
        made = model()
        notes.extend(getattr(made, "notes", ()))
        return made

    return predict(noted, progress=progress, **options), tuple(notes)


def _footprint_json(footprint: Footprint, notes: tuple[str, ...]) -> str:
    from autobatch.records.codec import dump_json, encode
    from autobatch.records.plan_json import SCHEMA_VERSION

    header = {"schema_version": SCHEMA_VERSION, "peak_device_bytes": footprint.peak_device_bytes}
    return dump_json(header | encode(footprint) | {"notes": list(notes)})
