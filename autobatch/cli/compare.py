"""The command `compare`: the same training on several cards."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from autobatch.cli.options import (
    add_objective,
    add_question,
    add_report,
    add_verb,
    add_workload_options,
    complete_gpus,
)
from autobatch.cli.running import (
    Model,
    following,
    model_of,
    outputs,
    run_apart,
    tell,
    workload_options,
)
from autobatch.errors import DoesNotFitError, UsageError

if TYPE_CHECKING:
    from autobatch.choosing.comparison import Comparison
    from autobatch.records.progress import ProgressCallback

__all__ = ["add", "run"]


def add(verbs: Any) -> None:
    """Add the command to a parser's sub-parsers."""
    parser = add_verb(
        verbs,
        "compare",
        run,
        usage="SPEC --target N --gpus A,B [options]",
        help="say what fits on each of several GPUs, how fast it is estimated to be, and its cost",
        description="Simulate the same training on several GPUs: what fits, the ceiling, and "
        "estimates of the seconds a window and, with prices, of the cost of a million samples.",
        examples=[
            "compare hf:gpt2 --target 256 --gpus t4,l4,a10g,rtx-4090",
            "compare train.py:build --target 512 --gpus l4,a100-40gb --price l4=0.7,a100-40gb=2.5",
        ],
    )
    add_question(parser, headroom="what 95 of 100 published runs needed")
    named: Any = parser.add_argument(
        "--gpus",
        required=True,
        metavar="A,B",
        help="GPUs to simulate: names from `autobatch gpus`, or sizes such as 24GiB",
    )
    named.completer = complete_gpus
    parser.add_argument(
        "--price",
        action="append",
        default=[],
        metavar="GPU=X",
        help="what one such GPU costs for an hour, in any currency; once for each GPU",
    )
    add_objective(parser)
    add_workload_options(parser, gpu=False)
    add_report(parser)


def run(arguments: argparse.Namespace) -> int:
    """Compare, and show the table; the code of `DoesNotFitError` where no card fits."""
    from autobatch.choosing.cards import distinct_cards, prices_of
    from autobatch.report.comparison import comparison_document

    with outputs(arguments, "comparison"):
        options = {
            "target": arguments.target,
            "gpus": _names(arguments.gpus),
            "prices": _prices(arguments.price),
            "objective": arguments.objective,
            "headroom": arguments.headroom,
            **workload_options(arguments),
        }
        cards = distinct_cards(options["gpus"])
        prices_of(options["prices"], cards)  # refused before anything is imported or built
        work = partial(_compare, model_of(arguments, cards), options)
        with following(arguments) as progress:
            compared = run_apart(arguments, work, progress, on_gpu=False)
        tell(arguments, compared, comparison_document(compared))
    return 0 if compared.fitting else DoesNotFitError.exit_code


def _compare(model: Model, options: dict[str, Any], *, progress: ProgressCallback) -> Comparison:
    from autobatch.choosing.compare import compare

    return compare(model, progress=progress, **options)


def _names(text: str) -> list[str]:
    """Return the names in a list; an empty one stays, and is refused by name.

    >>> _names("t4, l4")
    ['t4', 'l4']
    """
    return [name.strip() for name in text.split(",")] if text.strip() else []


def _prices(given: Sequence[str]) -> dict[str, float]:
    """Return prices by name of the card.

    Raises:
        UsageError: one is not written GPU=NUMBER, or there are two for one card.

    >>> _prices(["h100-80gb=2.5"])
    {'h100-80gb': 2.5}
    """
    prices: dict[str, float] = {}
    for text in (part for each in given for part in each.split(",")):
        name, equals, number = text.partition("=")
        name = name.strip()
        try:
            price = float(number) if equals and name else None
        except ValueError:
            price = None
        if price is None:
            raise UsageError(
                f"--price is {text!r}: write GPU=NUMBER, such as h100-80gb=2.5, what one such GPU "
                "costs for an hour"
            )
        if name in prices:
            raise UsageError(f"there are two prices for {name}: give one")
        prices[name] = price
    return prices
