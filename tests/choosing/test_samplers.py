"""Samplers of Optuna by name, and the configurations of a space."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("optuna")

import optuna

from autobatch.choosing.samplers import key_of, points_near, sampler_named, whole_space
from autobatch.errors import UsageError
from tests.support.sweeps import LETTERS, SIZES, suggest


def test_a_space_is_gone_through_in_its_order() -> None:
    space = whole_space(suggest, 20)
    assert space is not None
    assert [tuple(each.params.values()) for each in space] == [
        (letter, size) for letter in LETTERS for size in SIZES
    ]
    assert whole_space(suggest, 19) is None


def test_a_space_that_depends_on_its_own_values_is_gone_through() -> None:
    def nested(trial: Any) -> None:
        if trial.suggest_categorical("lora", [False, True]):
            trial.suggest_int("rank", 4, 16, step=4)

    space = whole_space(nested, 50)
    assert space is not None and len(space) == 5


def test_the_nearest_configurations_come_first_whatever_they_depend_on() -> None:
    def nested(trial: Any) -> None:
        if trial.suggest_categorical("lora", [False, True]):
            trial.suggest_int("rank", 4, 12, step=4)
        trial.suggest_float("share", 0.1, 0.3, step=0.1)

    center = {"lora": True, "rank": 8, "share": 0.1}
    found = [dict(each.params) for each in points_near(nested, center)]
    assert found[0] == center
    keys = [key_of(params) for params in found]
    assert len(set(keys)) == len(keys) == 12
    assert set(keys) == {each.key for each in whole_space(nested, 12) or ()}
    apart = [sum(params[name] != center.get(name) for name in params) for params in found]
    distance = [sum(v != center.get(n, v) for n, v in params.items()) for params in found]
    assert distance == sorted(distance) and max(apart) > 1
    free = [dict(each.params) for each in points_near(nested, {"lora": False})]
    assert [params["lora"] for params in free] == [False] * 3 + [True] * 9


def test_of_numbers_without_a_step_the_centers_value_is_taken() -> None:
    def nested(trial: Any) -> None:
        trial.suggest_float("x", 0, 1)
        trial.suggest_categorical("y", ["a", "b"])

    found = [each.params for each in points_near(nested, {"x": 0.25, "y": "b"})]
    assert found == [{"x": 0.25, "y": "b"}, {"x": 0.25, "y": "a"}]
    assert next(points_near(nested, {})).params["x"] == 0.0


def test_a_space_without_end_is_none() -> None:
    assert whole_space(lambda trial: trial.suggest_float("x", 0, 1), 50) is None


def test_an_error_of_a_lever_is_not_taken_for_a_space_without_end() -> None:
    def raises(trial: Any) -> None:
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        whole_space(raises, 5)


def test_samplers_are_known_by_name() -> None:
    assert isinstance(sampler_named("nsga2"), optuna.samplers.NSGAIISampler)
    with pytest.raises(UsageError, match=r"no sampler 'tpa' .did you mean tpe"):
        sampler_named("tpa")
    with pytest.raises(UsageError, match="sampler is a int: use a name"):
        sampler_named(5)  # type: ignore[arg-type]
