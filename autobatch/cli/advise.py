"""The command `advise`: what each lever would do, and what it would take otherwise."""

from __future__ import annotations

import argparse
from functools import partial
from typing import TYPE_CHECKING, Any

from autobatch.cli.options import add_question, add_verb, add_workload_options
from autobatch.cli.running import (
    Model,
    following,
    model_of,
    named_gpu,
    outputs,
    run_apart,
    sized_model_of,
    tell,
    workload_options,
)

if TYPE_CHECKING:
    from autobatch.plan.advice import Advice
    from autobatch.records.progress import ProgressCallback
    from autobatch.workload.workload import Workload

__all__ = ["add"]

_SIZES = {"hf": "seq", "timm": "img_size", "torchvision": "img_size"}
"""The option of a library's SPEC that says how large a sample is."""


def add(verbs: Any) -> None:
    """Add the command to a parser's sub-parsers."""
    parser = add_verb(
        verbs,
        "advise",
        _run,
        usage="SPEC --target N [options]",
        help="say what each lever (checkpointing, precision, optimizer …) does to memory and time",
        description="Apply every lever to a copy, simulate it, and list what fits, how fast it is "
        "estimated to be, and the line of code that does it.",
        examples=[
            "advise hf:gpt2 --target 64 --gpu t4",
            "advise train.py:build --target 256 --gpu 24GiB --levers checkpointing,precision",
        ],
    )
    add_question(parser, headroom="what 95 of 100 published runs needed")
    parser.add_argument(
        "--levers", metavar="A,B", help="only these, of docs/levers.md (default: all)"
    )
    parser.add_argument(
        "--allow-numerics",
        action="store_true",
        help="combine levers with which training computes something else, too",
    )
    add_workload_options(parser)


def _run(arguments: argparse.Namespace) -> None:
    from autobatch.plan.advice import advice_document

    levers = arguments.levers
    with outputs(arguments):
        gpu = named_gpu(arguments)
        options = {
            "target": arguments.target,
            "gpu": gpu,
            "levers": None if levers is None else [name.strip() for name in levers.split(",")],
            "allow_numerics": arguments.allow_numerics,
            "headroom": arguments.headroom,
            **workload_options(arguments),
        }
        model, size = model_of(arguments, [gpu]), None
        name = _SIZES.get(arguments.spec.partition(":")[0])
        if name is not None and not arguments.input_shape and not arguments.sample:
            size = name, sized_model_of(arguments, name, [gpu])
        with following(arguments) as progress:
            work = partial(_advise, model, size, options)
            advice: Advice = run_apart(arguments, work, progress, on_gpu=False)
        tell(arguments, advice, advice_document(advice))


def _advise(
    make: Model,
    sizes: tuple[str, Model] | None,
    options: dict[str, Any],
    *,
    progress: ProgressCallback,
) -> Advice:
    from autobatch.devices.choose import built
    from autobatch.tuning.advise import advise

    model: Any = make
    resized = None
    if sizes is not None:
        name, sized = sizes
        model = built(make, options["gpu"])
        size = _size_of(model, name)
        resized = None if size is None else (name, size, sized)
    return advise(model, progress=progress, resized=resized, **options)


def _size_of(workload: Workload, name: str) -> int | None:
    """Return the length of the sequences that a workload's batches hold, or the side of images."""
    from autobatch.workload.tree import tensors

    shapes = [tensor.shape for tensor in tensors(workload.batch(1))]
    dims = 2 if name == "seq" else 4
    return next((shape[-1] for shape in shapes if len(shape) == dims), None)
