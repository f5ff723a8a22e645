"""What Optuna is asked for without a study of ours: samplers, and the configurations of a space.

Invariant: Optuna says nothing below a warning, and its verbosity is afterwards as before.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler

from autobatch.errors import UsageError
from autobatch.support.wording import near

__all__ = [
    "SAMPLERS",
    "BaseSampler",
    "FixedTrial",
    "Point",
    "Trial",
    "is_endless",
    "key_of",
    "points_at",
    "points_near",
    "quiet",
    "sampler_named",
    "whole_space",
]

Trial = optuna.Trial
FixedTrial = optuna.trial.FixedTrial

SAMPLERS: Mapping[str, Callable[[int | None], BaseSampler]] = {
    "tpe": lambda seed: optuna.samplers.TPESampler(seed=seed, constant_liar=True),
    "nsga2": lambda seed: optuna.samplers.NSGAIISampler(seed=seed),
    "nsga3": lambda seed: optuna.samplers.NSGAIIISampler(seed=seed),
    "random": lambda seed: optuna.samplers.RandomSampler(seed=seed),
    "qmc": lambda seed: optuna.samplers.QMCSampler(seed=seed),
}
"""Samplers of Optuna by name, for two objectives; its own default is TPE."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One configuration of a space.

    Attributes:
        params: value by name.
        distributions: what each was chosen from.
    """

    params: Mapping[str, Any]
    distributions: Mapping[str, BaseDistribution]

    @property
    def key(self) -> str:
        """The same text for the same configuration."""
        return key_of(self.params)


def key_of(params: Mapping[str, Any]) -> str:
    """Return the same text for the same values."""
    return json.dumps(params, sort_keys=True, default=str)


def sampler_named(name: str | BaseSampler, seed: int | None = None) -> BaseSampler:
    """Return a sampler of Optuna by its name, or itself.

    Raises:
        UsageError: there is none of that name, or it is something else.
    """
    if isinstance(name, BaseSampler):
        return name
    if not isinstance(name, str):
        raise UsageError(
            f"sampler is a {type(name).__name__}: use a name, such as tpe, or a sampler of Optuna"
        )
    if name not in SAMPLERS:
        known = ", ".join(["grid", *SAMPLERS])
        raise UsageError(f"there is no sampler {name!r}{near(name, SAMPLERS)}; samplers: {known}")
    with quiet():
        return SAMPLERS[name](seed)


def whole_space(suggest: Callable[[Trial], object], most: int) -> list[Point] | None:
    """Return every configuration of a space, in its order.

    None where there are more than `most`, and where numbers without a step have no end.

    Args:
        suggest: asks a trial for the value of each parameter.
        most: configurations to look at.
    """
    points: list[Point] = []
    for point in points_near(suggest, {}):
        if is_endless(point) or len(points) == most:
            return None
        points.append(point)
    return points


def points_near(suggest: Callable[[Any], object], center: Mapping[str, Any]) -> Iterator[Point]:
    """Yield the configurations of a space, the nearest first: those that differ in fewest values.

    Which values there are may depend on other values. Of a number without a step, only the value
    of the center is taken.

    Args:
        suggest: asks a trial for the value of each parameter.
        center: what to compare with; parameters that it leaves out make no difference.
    """
    differences, are_more = 0, True
    while are_more:
        places: list[int] = []
        are_more = False
        while True:
            listing = _Listing(places, center, differences)
            suggest(listing)
            if not listing.differences_left:
                yield Point(params=listing.params, distributions=listing.distributions)
            are_more |= listing.is_cut
            places = listing.next_places()
            if not places:
                break
        differences += 1


def is_endless(point: Point) -> bool:
    """Say whether a configuration has a number without a step, whose values cannot be listed."""
    return any(_count(among) is None for among in point.distributions.values())


def points_at(suggest: Callable[[Any], object], values: Iterable[Mapping[str, Any]]) -> list[Point]:
    """Return configurations whose values are known.

    Args:
        suggest: asks a trial for the value of each parameter.
        values: of each configuration, by parameter.
    """
    points = []
    for each in values:
        trial = FixedTrial(dict(each))
        suggest(trial)
        points.append(Point(params=trial.params, distributions=trial.distributions))
    return points


@contextlib.contextmanager
def quiet(level: int = optuna.logging.WARNING) -> Iterator[None]:
    """Keep Optuna from saying what it does below a level, and what of it is experimental."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(max(before, level))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(before)


class _Listing(FixedTrial):
    """A trial that gives each parameter the value at a place among those that it can have.

    The first place is that of the center's value. Parameters without a given place get their first.
    """

    def __init__(self, places: list[int], center: Mapping[str, Any], differences: int) -> None:
        super().__init__({})
        self._places = places
        self._center = center
        self._values: dict[str, Any] = {}
        self._among: dict[str, BaseDistribution] = {}
        self._chosen: list[int] = []
        self._counts: list[int] = []
        self.differences_left = differences
        self.is_cut = False

    @property
    def params(self) -> dict[str, Any]:
        return self._values

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        return self._among

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        return float(self._value(name, FloatDistribution(low, high, log=log, step=step)))

    def suggest_int(
        self, name: str, low: int, high: int, *, step: int = 1, log: bool = False
    ) -> int:
        return int(self._value(name, IntDistribution(low, high, log=log, step=step)))

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        return self._value(name, CategoricalDistribution(choices))

    def next_places(self) -> list[int]:
        """Return the places after these; none where there are no more."""
        places = self._chosen
        while places and places[-1] + 1 >= self._counts[len(places) - 1]:
            places = places[:-1]
        return [*places[:-1], places[-1] + 1] if places else []

    def _value(self, name: str, among: BaseDistribution) -> Any:
        if name in self._values:
            return self._values[name]
        center = _place_of(among, self._center[name]) if name in self._center else None
        count = _count(among)
        if count is None:
            value = among.low if center is None else self._center[name]  # type: ignore[attr-defined]
        else:
            if center is not None and not self.differences_left:
                self.is_cut |= count > 1
                count = 1
            asked = len(self._chosen)
            place = min(self._places[asked], count - 1) if asked < len(self._places) else 0
            self._chosen.append(place)
            self._counts.append(count)
            if center is not None:
                self.differences_left -= place > 0
                place = center if place == 0 else place - (place <= center)
            value = _value_at(among, place)
        self._values[name], self._among[name] = value, among
        return value


def _count(among: BaseDistribution) -> int | None:
    """Return how many values a parameter can have; None where they have no end."""
    if isinstance(among, CategoricalDistribution):
        return len(among.choices)
    assert isinstance(among, (FloatDistribution, IntDistribution))
    if among.low == among.high:
        return 1
    return None if among.step is None else round((among.high - among.low) / among.step) + 1


def _value_at(among: BaseDistribution, place: int) -> Any:
    if isinstance(among, CategoricalDistribution):
        return among.choices[place]
    assert isinstance(among, (FloatDistribution, IntDistribution))
    if isinstance(among, IntDistribution):
        return among.low + place * among.step
    return float(Decimal(str(among.low)) + place * Decimal(str(among.step or 0)))


def _place_of(among: BaseDistribution, value: Any) -> int | None:
    """Return the place of a value; None where a parameter cannot have it."""
    try:
        inner = among.to_internal_repr(value)
    except ValueError:
        return None
    if isinstance(among, CategoricalDistribution):
        return int(inner)
    assert isinstance(among, (FloatDistribution, IntDistribution))
    if not among.low <= inner <= among.high:
        return None
    return round((inner - among.low) / among.step) if among.step else 0
