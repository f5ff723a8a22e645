"""The command `report`: a saved plan as a page."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from autobatch.cli.options import add_verb
from autobatch.cli.running import opened

__all__ = ["add"]


def add(verbs: Any) -> None:
    """Add the command to a parser's sub-parsers."""
    parser = add_verb(
        verbs,
        "report",
        _run,
        usage="PLAN.JSON [options]",
        help="render a saved plan again, without a GPU",
        examples=["report out/plan.json --open", "report plan.json --out page"],
    )
    parser.add_argument("plan", metavar="PLAN.JSON", help="written by `autobatch probe`")
    parser.add_argument("--out", metavar="DIR", help="folder (default: PLAN-report beside it)")
    parser.add_argument("--open", action="store_true", help="open the report in a browser")


def _run(arguments: argparse.Namespace) -> None:
    """Render a saved plan."""
    from autobatch.plan.plan import Plan

    plan = Plan.load(arguments.plan)
    source = Path(arguments.plan)
    page = plan.report(arguments.out or source.with_name(f"{source.stem}-report"))
    print(page if arguments.quiet else f"report: {page}")
    if arguments.open:
        opened(page)
