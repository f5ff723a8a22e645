"""The command `sweep`: the fastest configuration, and the front of speed against memory."""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from autobatch.cli.options import (
    add_question,
    add_report,
    add_verb,
    add_workload_options,
    number,
)
from autobatch.cli.running import (
    Model,
    following,
    model_of,
    named_gpu,
    outputs,
    run_apart,
    tell,
    workload_options,
)

if TYPE_CHECKING:
    from autobatch.choosing.swept import Sweep
    from autobatch.records.progress import ProgressCallback

__all__ = ["add", "run"]


def add(verbs: Any) -> None:
    """Add the command to a parser's sub-parsers."""
    parser = add_verb(
        verbs,
        "sweep",
        run,
        usage="SPEC --target N [options]",
        help="find the fastest levers and micro-batch, and the front of speed against memory",
        description="Try levers and micro-batches together: on a simulated card each costs about "
        "a second, and its time is an estimate; on the card in this machine, time is measured. "
        "What cannot fit, or is slower and larger than another one, is not run.",
        examples=[
            "sweep hf:gpt2 --target 64 --gpu a100-40gb",
            "sweep train.py:build --target 256 --gpu t4 --levers checkpointing,optimizer",
            "sweep train.py:build --target 256 --trials 50 --storage sqlite:///sweep.db",
        ],
    )
    add_question(parser, headroom="as of `autobatch probe`")
    parser.add_argument(
        "--levers",
        metavar="A,B",
        help="names from docs/levers.md, with all their settings, and levers of your own as "
        "file.py:function (default: all levers, with settings that keep the numbers)",
    )
    parser.add_argument(
        "--allow-numerics",
        action="store_true",
        help="with all levers, also take settings with which training computes something else",
    )
    parser.add_argument(
        "--trials",
        type=int,
        metavar="N",
        help="configurations to run at most (default: all of a small space, 100 of a larger one)",
    )
    parser.add_argument(
        "--timeout", type=number, metavar="S", help="begin no more configurations after this long"
    )
    parser.add_argument(
        "--storage",
        metavar="URL",
        help="where to keep the study, so that it can be resumed and shared by several workers: "
        "sqlite:///sweep.db, or the path of a journal file",
    )
    parser.add_argument(
        "--study", default="autobatch", metavar="NAME", help="name of the study in the storage"
    )
    parser.add_argument(
        "--sampler",
        metavar="NAME",
        help="tpe, nsga2, nsga3, random or qmc of Optuna, or grid for the whole space (default: "
        "grid for a small space, tpe for a larger one)",
    )
    add_report(parser)
    add_workload_options(parser)


def run(arguments: argparse.Namespace) -> None:
    """Sweep, and show the front."""
    from autobatch.gpus.catalogue import is_device
    from autobatch.report.sweep import sweep_summary

    with outputs(arguments, "sweep"):
        gpu = named_gpu(arguments)
        options = {
            "target": arguments.target,
            "gpu": gpu,
            "allow_numerics": arguments.allow_numerics,
            "headroom": arguments.headroom,
            "trials": arguments.trials,
            "timeout": arguments.timeout,
            "storage": arguments.storage,
            "study": arguments.study,
            "sampler": arguments.sampler,
            **workload_options(arguments),
        }
        work = partial(_sweep, model_of(arguments, [gpu]), arguments.levers, options)
        with following(arguments, many=True) as progress:
            found: Sweep = run_apart(arguments, work, progress, on_gpu=is_device(gpu))
        found = replace(found, plan=replace(found.plan, command=arguments.command))
        tell(arguments, found, sweep_summary(found))


def _sweep(
    model: Model, levers: str | None, options: dict[str, Any], *, progress: ProgressCallback
) -> Sweep:
    from autobatch.choosing.sweep import sweep

    return sweep(
        model,
        levers=None if levers is None else [_lever(name.strip()) for name in levers.split(",")],
        progress=progress,
        **options,
    )


def _lever(name: str) -> Any:
    """Return a lever's name as it is, and load one of the user's own."""
    if ":" not in name:
        return name
    from autobatch.workload.spec.user_code import named_object

    return named_object(name)
