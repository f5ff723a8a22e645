"""The command `check`: is the accumulated gradient the same?"""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from autobatch.cli.options import (
    JSON_HELP,
    SPEC_HELP,
    add_inputs,
    add_isolation,
    add_levers,
    add_verb,
)
from autobatch.cli.running import Model, model_of, outputs, run_apart, tell

if TYPE_CHECKING:
    from autobatch.equivalence.result import Equivalence
    from autobatch.gpus.catalogue import GpuSpec
    from autobatch.records.progress import ProgressCallback
    from autobatch.workload.workload import Workload

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
            "check train.py:build --precision bf16 --lora r=16 --activation-checkpointing",
        ],
    )
    parser.add_argument("spec", metavar="SPEC", help=SPEC_HELP)
    parser.add_argument("--micro-batch", type=int, metavar="N", help="default 4")
    parser.add_argument("--accumulation-steps", type=int, metavar="K", help="default 2")
    parser.add_argument(
        "--plan", metavar="PLAN.JSON", help="compare this plan's window, or a smaller one like it"
    )
    add_inputs(parser)
    add_levers(parser.add_argument_group("how it is trained"))
    parser.add_argument("--json", metavar="FILE", help=JSON_HELP)
    add_isolation(parser)


def _run(arguments: argparse.Namespace) -> int:
    """Compare accumulated gradients with the whole batch's; 1 where they differ."""
    from autobatch.equivalence.result import equivalence_summary
    from autobatch.plan.plan import Plan
    from autobatch.records.progress import silent

    with outputs(arguments):
        options = {
            "plan": Plan.load(arguments.plan) if arguments.plan else None,
            "micro_batch": arguments.micro_batch,
            "accumulation_steps": arguments.accumulation_steps,
            "autocast": arguments.autocast,
        }
        work = partial(_equivalence, model_of(arguments, [_newest_card()]), options)
        result = run_apart(arguments, work, silent, on_gpu=False)
        tell(arguments, result, equivalence_summary(result))
    return 0 if result.equivalent else 1


def _equivalence(
    model: Model, options: dict[str, Any], *, progress: ProgressCallback
) -> Equivalence:
    from autobatch.equivalence.check import check_equivalence
    from autobatch.workload.workload import Workload

    subject = model()
    if not isinstance(subject, Workload):
        return check_equivalence(subject, **options)
    result = check_equivalence(_changed(subject), **options)
    return replace(result, notes=tuple(dict.fromkeys((*subject.notes, *result.notes))))


def _changed(workload: Workload) -> Workload:
    """Apply to a workload's own model, which this process alone has, what levers would to a copy.

    Optimizers, which levers may bring too, are not compared.
    """
    if not workload.changes:
        return workload
    from autobatch.workload.wrappers import unwrapped

    model = unwrapped(workload.model)
    for change in workload.changes:
        model = change(model) or model
    return replace(workload, model=model, changes=())


def _newest_card() -> GpuSpec:
    """Return a card that has every number format; what is run here is run on the CPU."""
    from autobatch.gpus.catalogue import CATALOGUE

    return max(CATALOGUE.values(), key=lambda card: card.compute_capability)
