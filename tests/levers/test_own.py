"""Levers of the user's own that are wrong are told, and change nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from autobatch.errors import UsageError, WorkloadError
from autobatch.gpus.catalogue import find_gpu
from autobatch.levers.known import LEVERS
from autobatch.levers.lever import Lever, Option, WrongLeverError, applied
from autobatch.levers.own import OwnLevers
from autobatch.levers.setup import Setup
from autobatch.workload.workload import Workload


def setup() -> Setup:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    return Setup(
        workload=Workload(model=model, batch=lambda n: torch.zeros(n, 8)), gpu=find_gpu("t4")
    )


def lever(apply: Callable[[Setup], Any]) -> Lever:
    option = Option(lever="mine", value="on", what="", code="", apply=apply)
    return Lever(name="mine", what="", options=lambda setup: [option])


def frozen(setup: Setup) -> Setup:
    setup.model[0].requires_grad_(False)
    return setup


def failing(setup: Setup) -> Setup:
    raise KeyError("no such layer")


def test_what_an_option_raises_names_the_lever() -> None:
    given = setup()
    [mine] = OwnLevers(given).checked([lever(failing)])
    [option] = mine.options(given)
    with pytest.raises(WorkloadError, match="the lever mine raised KeyError: 'no such layer'"):
        option.apply(given)


def test_an_option_that_ends_the_process_does_not() -> None:
    given = setup()
    [mine] = OwnLevers(given).checked([lever(lambda setup: sys.exit(3))])
    [option] = mine.options(given)
    with pytest.raises(WorkloadError, match=r"the lever mine failed: .*sys.exit\(3\)"):
        option.apply(given)


@pytest.mark.parametrize(
    ("offered", "said"),
    [(None, "offered a NoneType"), (["x"], "offered a str"), ("x", "offered a str")],
)
def test_what_is_no_list_of_options_is_told(offered: Any, said: str) -> None:
    given = setup()
    wrong = Lever(name="mine", what="", options=lambda setup: offered)
    [mine] = OwnLevers(given).checked([wrong])
    with pytest.raises(WrongLeverError, match=said):
        mine.options(given)


def test_options_may_come_one_by_one() -> None:
    given = setup()
    [option] = lever(frozen).options(given)
    own = Lever(name="mine", what="", options=lambda setup: (each for each in (option,)))
    [mine] = OwnLevers(given).checked([own])
    assert [each.label for each in mine.options(given)] == ["mine: on"]


def test_an_option_that_makes_no_setup_is_told_wherever_it_is_applied() -> None:
    with pytest.raises(UsageError, match="the lever mine made a NoneType of a Setup"):
        applied(setup(), lever(lambda setup: None).options(setup()))


def test_a_lever_that_changes_the_users_model_is_told_and_undone() -> None:
    given = setup()
    [mine] = OwnLevers(given).checked([lever(frozen)])
    [option] = mine.options(given)
    with pytest.raises(
        WrongLeverError, match=r"mine changed .*0\.weight\.requires_grad.*as before"
    ):
        option.apply(given)
    assert all(parameter.requires_grad for parameter in given.model.parameters())


def test_so_is_one_that_raises_afterwards() -> None:
    given = setup()
    [mine] = OwnLevers(given).checked([lever(lambda setup: failing(frozen(setup)))])
    [option] = mine.options(given)
    with pytest.raises(WrongLeverError, match="requires_grad") as caught:
        option.apply(given)
    assert isinstance(caught.value.__cause__, KeyError)
    assert all(parameter.requires_grad for parameter in given.model.parameters())


def test_values_that_a_lever_wrote_cannot_be_put_back() -> None:
    given = setup()

    def zeroed(setup: Setup) -> Setup:
        nn.init.zeros_(setup.model[0].weight)
        return setup

    [mine] = OwnLevers(given).checked([lever(zeroed)])
    [option] = mine.options(given)
    with pytest.raises(WrongLeverError, match=r"0\.weight\.values cannot be put back: build"):
        option.apply(given)


def test_levers_of_the_package_are_taken_as_they_are() -> None:
    assert OwnLevers(setup()).checked(LEVERS.values()) == list(LEVERS.values())
