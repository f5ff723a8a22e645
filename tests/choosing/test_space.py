"""What a sweep chooses from."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("optuna")

from autobatch.choosing.points import Points
from autobatch.choosing.samplers import FixedTrial, whole_space
from autobatch.choosing.space import AS_IT_IS, MICRO_BATCH, Configuration, Space, planned_sizes
from autobatch.errors import LeverError, UsageError, WorkloadError
from autobatch.gpus.catalogue import find_gpu
from autobatch.levers.lever import Lever, Option
from autobatch.levers.setup import Setup
from autobatch.records.split import split
from autobatch.workload.workload import Workload


def setup(**options: Any) -> Setup:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(4)))
    workload = Workload(model=model, batch=lambda n: torch.zeros(n, 8), **options)
    return Setup(workload=workload, gpu=find_gpu("t4"))


def option(value: str, apply: Any = lambda setup: setup, **facts: Any) -> Option:
    return Option(lever="mine", value=value, what="", code=f"do({value!r})", apply=apply, **facts)


def lever(*options: Option, name: str = "mine") -> Lever:
    return Lever(name=name, what="", options=lambda setup: options)


def space(levers: Any = None, given: Setup | None = None, **options: Any) -> Space:
    known = {"allow_numerics": False, "keeps_settings": False, **options}
    return Space(given or setup(), 16, levers, **known)


def configuration(of: Space, **params: Any) -> Configuration:
    made = of.configuration(FixedTrial({MICRO_BATCH: 4, **params}))
    assert isinstance(made, Configuration), made
    return made


@pytest.mark.parametrize(("target", "ranks"), [(96, 1), (240, 2), (17, 1), (1, 1), (1000, 8)])
def test_sizes_are_those_that_plans_can_have(target: int, ranks: int) -> None:
    per_rank = -(-target // ranks)
    planned = set()
    for ceiling in range(1, per_rank + 1):
        with suppress(UsageError):  # the target cannot be shared out so
            planned.add(split(target, ceiling=ceiling, world_size=ranks).micro_batch)
    assert planned_sizes(target, ranks) == tuple(sorted(planned, reverse=True))


def test_of_many_sizes_those_close_to_larger_ones_are_left_out() -> None:
    sizes = planned_sizes(720_720, 1)
    assert len(sizes) <= 24
    assert sizes[0] == 720_720 and sizes[-1] == 1


def test_settings_that_change_numbers_need_a_word() -> None:
    plain, lossy = option("plain"), option("lossy", changes_numerics=True)
    default = space()
    assert "precision" not in default.described["levers"]
    assert "precision" in space(allow_numerics=True).described["levers"]
    assert space(["precision"]).described["levers"]["precision"][0] == AS_IT_IS
    values = space([lever(plain, lossy)]).described["levers"]["mine"]
    assert values == [AS_IT_IS, "plain", "lossy"]


def test_a_lever_changes_the_setup_and_says_so() -> None:
    clipped = option("clipped", lambda setup: setup.having(clip_norm=1.0), changes_numerics=True)
    both = space([lever(clipped)])
    made = configuration(both, mine="clipped")
    assert made.setup.workload.clip_norm == 1.0
    assert made.changes_numerics
    assert (made.split.accumulation_steps, dict(made.settings)) == (4, {"mine": "clipped"})
    unchanged = configuration(both, mine=AS_IT_IS)
    assert unchanged.setup.workload.clip_norm is None and not unchanged.changes_numerics


def test_what_cannot_be_had_with_the_levers_before_it_is_no_configuration() -> None:
    first = option("on", lambda setup: setup.having(clip_norm=1.0))

    def only_without(setup: Setup) -> list[Option]:
        return [] if setup.workload.clip_norm else [option("late")]

    later = Lever(name="later", what="", options=only_without)
    both = space([lever(first), later])
    refused = both.configuration(FixedTrial({"mine": "on", "later": "late", MICRO_BATCH: 4}))
    assert refused == "later: late cannot be had with the levers before it"
    assert configuration(both, mine=AS_IT_IS, later="late")


def test_a_lever_that_refuses_a_setup_is_no_configuration() -> None:
    def refuses(setup: Setup) -> Setup:
        raise UsageError("not with this model")

    # the space itself only asks what a lever offers
    one = space([lever(option("on", refuses))])
    refused = one.configuration(FixedTrial({"mine": "on", MICRO_BATCH: 4}))
    assert refused == "mine: on: UsageError: not with this model"


def test_a_lever_of_ones_own_takes_the_trial() -> None:
    def clip(trial: Any) -> Any:
        norm = trial.suggest_int("norm", 1, 3)
        return lambda setup: setup.having(clip_norm=float(norm))

    both = space(["checkpointing", clip])
    points = whole_space(both.suggest, 500)
    assert points is not None
    assert {each.params["norm"] for each in points} == {1, 2, 3}
    params = dict(points[0].params, norm=2)
    params.pop(MICRO_BATCH)
    made = configuration(both, **params)
    assert made.setup.workload.clip_norm == 2.0
    assert made.settings["norm"] == "2"
    assert made.setup.workload.levers[-1].label == "clip: of yours"


def test_what_cannot_be_combined_does_not_make_a_space_larger() -> None:
    first = [option(str(n), excludes=frozenset(("other",))) for n in range(8)]
    second = [replace(each, lever="other", excludes=frozenset(("mine",))) for each in first]
    points = Points(space([lever(*first), lever(*second, name="other")]))
    sizes = len(planned_sizes(16, 1))
    assert len(points.whole(17 * sizes) or ()) == 17 * sizes < 9 * 9 * sizes
    assert points.whole(17 * sizes - 1) is None


def test_a_configuration_knows_what_was_applied_to_it() -> None:
    def same(trial: Any) -> Any:
        return lambda setup: setup

    both = space([lever(option("on", lambda setup: setup.having(clip_norm=1.0))), same])
    (had,) = configuration(both, mine="on").setup.workload.levers
    assert (had.label, had.code) == ("mine: on", "do('on')")
    assert configuration(both, mine=AS_IT_IS).setup.workload.levers == ()


@pytest.mark.parametrize(
    ("own", "error", "said"),
    [
        (lambda trial: None, UsageError, "returned a NoneType: it must return a function"),
        (lambda trial: lambda setup: 5, UsageError, "made a int of a Setup"),
        (lambda trial: 1 / 0, WorkloadError, "raised ZeroDivisionError"),
    ],
)
def test_a_lever_of_ones_own_that_is_wrong_is_told(own: Any, error: Any, said: str) -> None:
    with pytest.raises(error, match=said):
        space([own]).configuration(FixedTrial({MICRO_BATCH: 4}))


def halves(refusal: Exception) -> Any:
    def half(trial: Any) -> Any:
        value = trial.suggest_categorical("half", ["ok", "bad"])

        def change(setup: Setup) -> Setup:
            if value == "bad":
                raise refusal
            return setup.having(clip_norm=1.0)

        return change

    return half


@pytest.mark.parametrize("refusal", [RuntimeError("no such"), UsageError("no such")])
def test_what_a_lever_of_ones_own_makes_of_a_setup_may_fail(refusal: Exception) -> None:
    one = space([halves(refusal)])
    failure = configuration(one, half="bad").failure
    assert failure is not None and failure.endswith("no such")
    assert configuration(one, half="ok").failure is None


def test_what_a_lever_of_ones_own_cannot_be_had_with_is_no_configuration() -> None:
    refused = space([halves(LeverError("not here"))]).configuration(
        FixedTrial({"half": "bad", MICRO_BATCH: 4})
    )
    assert refused == "half: LeverError: not here"


def test_an_option_of_ones_own_that_raises_is_a_failure() -> None:
    def raises(setup: Setup) -> Setup:
        raise KeyError("layer")

    one = space([lever(option("on", raises)), halves(RuntimeError())], keeps_settings=True)
    made = configuration(one, mine="on", half="ok")
    assert made.failure == "WorkloadError: the lever mine raised KeyError: 'layer'"
    assert dict(made.settings) == {"mine": "on", "half": "ok"}


def test_an_option_of_ones_own_that_makes_no_setup_is_told() -> None:
    one = space([lever(option("on", lambda setup: None))])
    with pytest.raises(UsageError, match="the lever mine made a NoneType of a Setup"):
        one.configuration(FixedTrial({"mine": "on", MICRO_BATCH: 4}))


def test_a_lever_of_ones_own_that_changes_the_model_in_place_is_told() -> None:
    given = setup()

    def freeze(trial: Any) -> Any:
        def change(setup: Setup) -> Setup:
            setup.model[0].requires_grad_(False)
            return setup

        return change

    with pytest.raises(UsageError, match="the lever freeze changed what you train in place"):
        configuration(space([freeze], given))
    assert all(parameter.requires_grad for parameter in given.model.parameters())


class Same:
    """A lever that is an object."""

    def __call__(self, trial: Any) -> Any:
        return lambda setup: setup.having(clip_norm=1.0)


def test_whatever_can_be_called_is_a_lever() -> None:
    def clip(norm: float, trial: Any) -> Any:
        return lambda setup: setup.having(clip_norm=norm)

    one = space([Same(), partial(clip, 2.0)])
    names = one.described["own levers"]
    assert {"tests.choosing.test_space.Same", f"{__name__}.{clip.__qualname__}.0"} <= names.keys()
    had = [each.label for each in configuration(one).setup.workload.levers]
    assert had == ["Same: of yours", "clip: of yours"]
    assert space(Same()).has_own


def test_a_space_tells_apart_what_levers_of_ones_own_do() -> None:
    def clip(norm: float, trial: Any) -> Any:
        return lambda setup: setup.having(clip_norm=norm)

    def clipping(norm: float) -> Lever:
        return lever(option("on", lambda setup: setup.having(clip_norm=norm)))

    def about(*levers: Any) -> Any:
        return space([*levers]).described

    one, other = partial(clip, 1.0), partial(clip, 2.0)
    assert about(one) == about(partial(clip, 1.0)) != about(other)
    assert about(one, other) != about(other, one)
    assert about(clipping(1.0)) == about(clipping(1.0)) != about(clipping(2.0))
    assert about("precision")["own levers"] == {}


def test_what_is_no_lever_is_refused() -> None:
    with pytest.raises(UsageError, match="levers holds a int"):
        space(5)
    with pytest.raises(UsageError, match="levers holds a int"):
        space([5])
    with pytest.raises(UsageError, match=r"no lever 'checkpoint' .did you mean checkpointing"):
        space(["checkpoint"])


def test_sizes_that_more_ranks_cannot_have_are_no_configurations() -> None:
    shared = option("4 GPUs", lambda setup: setup.having(world_size=4))
    one = space([lever(shared)])
    refused = one.configuration(FixedTrial({"mine": "4 GPUs", MICRO_BATCH: 16}))
    assert refused == "no update of 16 samples has micro-batch 16 on these GPUs"
    assert configuration(one, mine="4 GPUs").split.accumulation_steps == 1


def test_a_process_that_runs_keeps_the_settings_of_its_allocator() -> None:
    def expandable(setup: Setup) -> Setup:
        return replace(setup, settings=replace(setup.settings, expandable_segments=True))

    mine = lever(option("expandable", expandable), option("other"))
    assert space([mine]).described["levers"]["mine"] == [AS_IT_IS, "expandable", "other"]
    kept = space([mine], keeps_settings=True)
    assert kept.described["levers"]["mine"] == [AS_IT_IS, "other"]


def test_options_that_exclude_each_other_are_no_configuration() -> None:
    other = replace(option("on"), lever="other", excludes=frozenset(["mine"]))
    both = space([lever(option("on")), lever(other, name="other")])
    refused = both.configuration(FixedTrial({"mine": "on", "other": "on", MICRO_BATCH: 4}))
    assert refused == "mine: on and other: on cannot be combined"
