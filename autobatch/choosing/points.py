"""The configurations of a space as points of a study, each put together once.

Invariant: of combinations that there are not, `had` leaves nothing, so that they need no trial.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

from autobatch.choosing.samplers import (
    FixedTrial,
    Point,
    is_endless,
    key_of,
    points_at,
    points_near,
    whole_space,
)
from autobatch.choosing.space import AS_IT_IS, MICRO_BATCH, Configuration, Space
from autobatch.choosing.untried import by_distance

__all__ = ["Points"]

_COUNTED = 2_000
"""Spaces of more configurations are not counted: each has to be put together for that."""

_LOOKED_AT = 64
"""So many combinations of values of levers of one's own are asked whether they change nothing."""


class Points:
    """The configurations of a space.

    Attributes:
        space: what they are chosen from.
        are_endless: whether some that were looked at have numbers without a step.
    """

    def __init__(self, space: Space) -> None:
        """Take a space; nothing is put together yet."""
        self.space = space
        self.are_endless = False
        self._sizes = points_at(space.suggest_size, [{MICRO_BATCH: size} for size in space.sizes])
        self._configurations: dict[str, Configuration | str] = {}

    def of(self, params: Mapping[str, Any]) -> Configuration | str:
        """Return the configuration that has some values; or why there is none.

        Raises:
            UsageError: as `Space.configuration`.
            WorkloadError: as `Space.configuration`.
        """
        key = key_of(params)
        if key not in self._configurations:
            self._configurations[key] = self.space.configuration(FixedTrial(dict(params)))
        return self._configurations[key]

    def at(self, params: Mapping[str, Any]) -> Configuration:
        """Return the configuration of values that are known to have one."""
        configuration = self.of(params)
        assert isinstance(configuration, Configuration)
        return configuration

    def had(self, points: Iterable[Point]) -> list[Point]:
        """Return those points of which there is a configuration."""
        return [point for point in points if isinstance(self.of(point.params), Configuration)]

    def whole(self, most: int) -> list[Point] | None:
        """Return the whole space in its order; None where it has more than so many configurations.

        Values that cannot be combined are no configuration, and may be most of the points.
        """
        points = whole_space(self.space.suggest, max(most, _COUNTED))
        if points is None:
            return None
        had = self.had(points)
        return had if len(had) <= most else None

    def counted(self) -> list[Point] | None:
        """Return the whole space, as it is first, where it is small enough to be counted."""
        found: list[Point] = []
        for _, points in self.near({}):
            found += points
            if len(found) > _COUNTED or self.are_endless:
                return None
        return self.had(found)

    def as_it_is(self) -> list[Point]:
        """Return the points without any change; with the first values of levers of one's own.

        Of such levers those values are taken that change nothing, where they are found.
        """
        first: list[Point] = []
        for _, points in islice(self.near({}), _LOOKED_AT):
            if any(points[0].params[name] != AS_IT_IS for name in self.space.settings):
                break
            if not (had := self.had(points)):
                continue
            first = first or had
            if self.space.is_as_it_is(self.at(had[0].params)):
                return had
        return first

    def near(self, center: Mapping[str, Any]) -> Iterator[tuple[str, list[Point]]]:
        """Yield combinations of settings by a key, the nearest first, with their micro-batches.

        Whether there is such a configuration is not looked at, as most are never asked for. Of
        numbers without a step, only those of the center are there.

        Args:
            center: values that they are compared with; levers that it leaves out are as they are.
        """
        center = dict.fromkeys(self.space.settings, AS_IT_IS) | dict(center)
        if self.space.has_own:
            found = points_near(self.space.suggest_settings, center)
        else:
            listed = by_distance(self.space.settings, center)
            found = (p for each in listed for p in points_at(self.space.suggest_settings, [each]))
        for point in found:
            self.are_endless |= is_endless(point)
            yield point.key, [_joined(point, size) for size in self._sizes]


def _joined(first: Point, second: Point) -> Point:
    return Point(
        params={**first.params, **second.params},
        distributions={**first.distributions, **second.distributions},
    )
