"""The command `check`: is the accumulated gradient the same?"""

from __future__ import annotations

import argparse
from functools import partial
from typing import TYPE_CHECKING, Any

from autobatch.cli.options import JSON_HELP, SPEC_HELP, add_inputs, add_isolation, add_verb
from autobatch.cli.running import Model, model_of, outputs, run_apart, tell

if TYPE_CHECKING:
    from autobatch.equivalence.result import Equivalence
    from autobatch.records.progress import ProgressCallback

__all__ = ["add"]


def add(verbs: Any) -> None:
    """Add the command to a parser's sub-parsers."""
    parser = add_verb(
        verbs,
        "check",
        _run,
        usage="SPEC [options]",
        help="compare accumulated gradients with those of the whole batch, on the CPU",
        description="Run a window on the CPU, in micro-batches and at once: is the gradient the "
        "same, and if not, which layer or loss makes the difference?",
        examples=[
            "check train.py:build",
            "check train.py:build --plan out/plan.json",
            "check timm:resnet18 --micro-batch 2 --accumulation-steps 4",
        ],
    )
    parser.add_argument("spec", metavar="SPEC", help=SPEC_HELP)
    parser.add_argument("--micro-batch", type=int, metavar="N", help="default 4")
    parser.add_argument("--accumulation-steps", type=int, metavar="K", help="default 2")
    parser.add_argument(
        "--plan", metavar="PLAN.JSON", help="compare this plan's window, or a smaller one like it"
    )
    add_inputs(parser)
    parser.add_argument("--json", metavar="FILE", help=JSON_HELP)
    add_isolation(parser)


def _run(arguments: argparse.Namespace) -> int:
    """Compare accumulated gradients with the whole batch's; 1 where they differ."""
    from autobatch.equivalence.result import equivalence_summary
    from autobatch.gpus.catalogue import CATALOGUE
    from autobatch.plan.plan import Plan
    from autobatch.records.progress import silent

    with outputs(arguments):
        options = {
            "plan": Plan.load(arguments.plan) if arguments.plan else None,
            "micro_batch": arguments.micro_batch,
            "accumulation_steps": arguments.accumulation_steps,
        }
        any_card = next(iter(CATALOGUE.values()))  # what is run here is run on the CPU
        work = partial(_equivalence, model_of(arguments, [any_card]), options)
        result = run_apart(arguments, work, silent, on_gpu=False)
        tell(arguments, result, equivalence_summary(result))
    return 0 if result.equivalent else 1


def _equivalence(
    model: Model, options: dict[str, Any], *, progress: ProgressCallback
) -> Equivalence:
    from autobatch.equivalence.check import check_equivalence

    return check_equivalence(model(), **options)
