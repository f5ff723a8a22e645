"""The commands' options, and their help."""

from __future__ import annotations

import argparse
import re
from typing import NoReturn

from autobatch._version import __version__
from autobatch.cli import advise, commands, compare, explain, sweep, vary
from autobatch.cli.options import (
    JSON_HELP,
    SPEC_HELP,
    add_isolation,
    add_objective,
    add_question,
    add_report,
    add_time_limit,
    add_workload_options,
)
from autobatch.support.wording import near

__all__ = ["parser"]


def parser() -> argparse.ArgumentParser:
    """Return the parser of all commands; `run` of what it parses is the command's function."""
    parser = _Parser(
        prog="autobatch",
        description="Find the micro-batch that fits a GPU, and where every byte of it goes.",
        epilog="Exit codes: 0 done, 1 the workload failed or the check found a difference, "
        "2 usage, 3 nothing fits.",
    )
    parser.add_argument("--version", action="version", version=f"autobatch {__version__}")
    verbs = parser.add_subparsers(metavar="COMMAND", required=True)

    probe = verbs.add_parser(
        "probe", help="plan micro-batch and accumulation steps for an effective batch"
    )
    probe.set_defaults(run=commands.probe)
    add_question(
        probe,
        headroom="0.05 where a GPU is measured; where it is simulated, what 95 of 100 published "
        "runs needed",
    )
    add_workload_options(probe)
    add_objective(probe)
    probe.add_argument("--prove", action="store_true", help="also run the size above the ceiling")
    probe.add_argument(
        "--no-cache",
        action="store_true",
        help="neither answer from the plan of an earlier probe, nor keep it",
    )
    add_time_limit(probe)
    vary.add_option(probe)
    add_report(probe)

    predict = verbs.add_parser("predict", help="account for the memory of one micro-batch")
    predict.set_defaults(run=commands.predict)
    predict.add_argument("spec", metavar="SPEC", help=SPEC_HELP)
    predict.add_argument("--micro-batch", type=int, required=True, metavar="N")
    predict.add_argument("--accumulation-steps", type=int, default=1, metavar="K")
    add_workload_options(predict)

    advise.add(verbs)
    compare.add(verbs)
    vary.add(verbs)
    sweep.add(verbs)

    check = verbs.add_parser(
        "check", help="compare accumulated gradients with those of the whole batch, on the CPU"
    )
    check.set_defaults(run=commands.check)
    check.add_argument("spec", metavar="SPEC", help=SPEC_HELP)
    check.add_argument("--micro-batch", type=int, metavar="N", help="default 4")
    check.add_argument("--accumulation-steps", type=int, metavar="K", help="default 2")
    check.add_argument(
        "--plan", metavar="PLAN.JSON", help="compare this plan's window, or a smaller one like it"
    )
    check.add_argument("--json", metavar="FILE", help=JSON_HELP)
    add_isolation(check)

    gpus = verbs.add_parser("gpus", help="list the known GPUs and those in this machine")
    gpus.set_defaults(run=commands.gpus)

    explain.add(verbs)

    report = verbs.add_parser("report", help="render a saved plan again, without a GPU")
    report.set_defaults(run=commands.report)
    report.add_argument("plan", metavar="PLAN.JSON")
    report.add_argument("--out", metavar="DIR", help="folder (default: PLAN-report beside it)")
    return parser


class _Parser(argparse.ArgumentParser):
    """Names the choice that was meant."""

    def error(self, message: str) -> NoReturn:
        found = re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message)
        hint = near(found[1], re.findall(r"[\w-]+", found[2])) if found else ""
        super().error(message + hint)
