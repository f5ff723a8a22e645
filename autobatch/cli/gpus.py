"""The command `gpus`: the catalogue, and the cards in this machine."""

from __future__ import annotations

import argparse
from typing import Any

from autobatch.cli.options import add_verb
from autobatch.cli.running import show_answer

__all__ = ["add"]


def add(verbs: Any) -> None:
    """Add the command to a parser's sub-parsers."""
    add_verb(
        verbs,
        "gpus",
        _run,
        usage="[options]",
        help="list the known GPUs and those in this machine",
        examples=["gpus", "gpus --quiet    # the names alone"],
    )


def _run(arguments: argparse.Namespace) -> None:
    """List the catalogue, and the GPUs in this machine."""
    from autobatch.gpus.catalogue import CATALOGUE
    from autobatch.gpus.nvml import installed_gpus
    from autobatch.report.gpu_list import gpu_list

    if arguments.quiet:
        print("\n".join(CATALOGUE))
        return
    show_answer(arguments, gpu_list(CATALOGUE.values(), installed_gpus()))
