"""`autobatch explain`: what a recorded memory snapshot shows."""

from __future__ import annotations

import argparse
from typing import Any

from autobatch.cli.options import JSON_HELP, add_report, add_verb
from autobatch.cli.running import outputs, tell

__all__ = ["add", "run"]


def add(verbs: Any) -> None:
    """Add the command and its options to the parser's sub-parsers."""
    parser = add_verb(
        verbs,
        "explain",
        run,
        usage="SNAPSHOT.PICKLE [options]",
        help="say what held the memory in a recorded PyTorch memory snapshot",
        description="Say what held the memory in a snapshot that PyTorch recorded, such as one of "
        "an out-of-memory error, and which allocator settings would have done.",
        examples=[
            "explain oom.pickle",
            "explain oom.pickle --report oom-report --open",
            "explain oom.pickle --settings expandable_segments:True --json -",
        ],
    )
    parser.add_argument(
        "snapshot",
        metavar="SNAPSHOT.PICKLE",
        help="written by torch.cuda.memory._dump_snapshot(); nothing in it is run",
    )
    parser.add_argument(
        "--device", type=int, metavar="N", help="explain this device only (default: all)"
    )
    parser.add_argument(
        "--settings",
        action="append",
        default=[],
        metavar="CONF",
        help="also try this PYTORCH_CUDA_ALLOC_CONF, such as max_split_size_mb:256; repeatable",
    )
    parser.add_argument(
        "--top", type=int, default=10, metavar="N", help="largest blocks to list (default 10)"
    )
    add_report(parser)
    parser.add_argument("--json", metavar="FILE", help=JSON_HELP)


def run(arguments: argparse.Namespace) -> None:
    """Explain a recorded memory snapshot."""
    from autobatch.report.explanation import explain
    from autobatch.report.explanation_summary import explanation_summary

    with outputs(arguments, "explanation"):
        explanation = explain(
            arguments.snapshot,
            device=arguments.device,
            settings=arguments.settings,
            top=arguments.top,
        )
        tell(arguments, explanation, explanation_summary(explanation))
