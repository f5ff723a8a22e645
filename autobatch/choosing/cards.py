"""The cards that a comparison is asked for, and their prices; no torch is needed to refuse them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

from autobatch.choosing.values import shown
from autobatch.errors import UsageError
from autobatch.gpus.catalogue import GpuSpec, find_gpu, is_device
from autobatch.support.wording import argument, for_reader

__all__ = ["distinct_cards", "prices_of"]

_ENDLESS = 1e100
"""No price is as high, and what it costs to train could not be written as a number."""


def distinct_cards(gpus: Iterable[str | GpuSpec]) -> tuple[GpuSpec, ...]:
    """Return the cards that are named.

    Raises:
        UsageError: there is none, one is named twice or is in this machine, or one is not known.
    """
    if isinstance(gpus, (str, GpuSpec)):
        gpus = (gpus,)
    if not isinstance(gpus, Iterable):
        raise UsageError(f"{argument('gpus')} is {shown(gpus)}: use {_example()}")
    cards: dict[str, GpuSpec] = {}
    for given in gpus:
        if given == "":
            raise UsageError(f"{argument('gpus')} has an empty name: use {_example()}")
        is_named = isinstance(given, str) and not is_device(given)
        if not is_named and not isinstance(given, GpuSpec):
            raise UsageError(
                f"{argument('gpus')} names {given!r}: cards are compared simulated, so use a name "
                "such as a100-40gb, or a size such as 24GiB"
            )
        card = given if isinstance(given, GpuSpec) else find_gpu(given, asked_as="gpus")
        if card.name in cards:
            raise UsageError(f"{argument('gpus')} names {card.name} twice: name each card once")
        cards[card.name] = card
    if not cards:
        raise UsageError(f"{argument('gpus')} names no card: use {_example()}")
    return tuple(cards.values())


def _example() -> str:
    return for_reader('gpus=["t4", "l4"]', "--gpus t4,l4")


def prices_of(prices: Mapping[str, float], cards: Sequence[GpuSpec]) -> dict[str, float]:
    """Return prices by the names of the cards.

    Raises:
        UsageError: a price is for a card that is not compared, or no price.
    """
    named = {card.name for card in cards}
    if not isinstance(prices, Mapping):
        raise UsageError(f"prices is {shown(prices)}: use a dict such as {{'t4': 0.35}}")
    found: dict[str, float] = {}
    given: Any
    price: Any
    for given, price in prices.items():
        if not isinstance(given, str):
            raise UsageError(f"there is a price for {shown(given)}: prices are by names of cards")
        name = given if given in named else find_gpu(given, asked_as="gpus").name
        if name not in named:
            raise UsageError(
                f"there is a price for {name}, which is not compared: "
                f"{argument('gpus')} names {', '.join(card.name for card in cards)}"
            )
        if name in found:
            raise UsageError(f"there are two prices for {name}: give one")
        is_number = isinstance(price, Real) and not isinstance(price, bool)
        if not is_number or not 0 <= price < _ENDLESS:
            raise UsageError(
                f"the price of {name} is {shown(price)}: give a number of at least 0, what one "
                "such card costs for an hour"
            )
        found[name] = float(price)
    return found
