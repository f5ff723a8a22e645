"""The page's command for other cards asks about the training that the plan is of."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
from typing import Any

import pytest

from autobatch.cli.parser import parsed, parser
from autobatch.records.applied import AppliedLever
from autobatch.report.html import plan_page
from autobatch.report.page.other_cards import DROPPED, KEPT, other_cards
from tests.support.plans import example_plan

LORA = AppliedLever(lever="lora", value="rank 16, attention", code="model = adapted(model)")


def asked(command: str | None, **changes: Any) -> Any:
    return other_cards(example_plan(command=command, **changes))


def compared(command: str) -> argparse.Namespace:
    """Return what the page's line asks, as the command line itself understands it."""
    words = shlex.split(asked(command).line)
    assert words[0] == "autobatch"
    return parsed(words[1:])


TRAINING = (
    "--input-shape 3x32x32,int64 --world-size 4 --sharding fsdp --optimizer sgd --clip-norm 0.5 "
    "--precision bf16-pure --activation-checkpointing every=2 --lora r=8 --headroom 0.2 "
    "--objective fastest"
)


def test_every_option_of_the_training_is_kept_with_its_value() -> None:
    probe = f"probe net.py:build --target 509 --gpu t4 {TRAINING} --report out --no-cache -v"
    given, found = parsed(shlex.split(probe)), compared(f"autobatch {probe}")
    names = [name.lstrip("-").replace("-", "_") for name in KEPT]
    assert {name: getattr(found, name) for name in names} == {
        name: getattr(given, name) for name in names
    }
    assert (found.spec, found.target) == ("net.py:build", 509)
    assert "a100-80gb" in found.gpus.split(",") and "a100-40gb" not in found.gpus  # the plan's own


@pytest.mark.parametrize(
    "probe",
    [
        "autobatch probe net.py:build --target=64 --gpu=t4 --precision=fp16",
        "autobatch -q probe --gpu t4 --prec fp16 --target 64 net.py:build --rep out",
        "autobatch probe --target 64 net.py:build --precision fp16 --activation-checkpointing",
        "autobatch sweep net.py:build --target 64 --levers precision --precision fp16 --trials 3",
    ],
)
def test_options_are_read_as_they_may_be_typed(probe: str) -> None:
    found = compared(probe)
    assert (found.spec, found.target, found.precision) == ("net.py:build", 64, "fp16")
    assert found.activation_checkpointing == ("full" if probe.endswith("checkpointing") else None)


def test_a_spec_with_spaces_and_marks_stays_one_word() -> None:
    command = shlex.join(["autobatch", "probe", "my net.py:f?seq=1&x='2'", "--target", "8"])
    assert compared(command).spec == "my net.py:f?seq=1&x='2'"


@pytest.mark.parametrize(
    ("command", "why"),
    [
        ("autobatch probe --config run.toml", "takes options from a file"),
        ("autobatch probe net.py:build --target 8 --new-option 3", "is not known"),
        ("autobatch probe net.py:build 'an open quote", "is not known"),
        ("autobatch vary net.py:build --target 8 --vary seq=1,2", "is not known"),
    ],
)
def test_where_the_command_does_not_say_it_all_there_is_none_and_it_is_said(
    command: str, why: str
) -> None:
    assert asked(command).line == ""
    assert why in asked(command).text
    page = plan_page(example_plan(command=command))
    assert why in page and "Command to compare cards" not in page


def test_levers_that_a_sweep_found_are_no_options_of_compare() -> None:
    swept = asked("autobatch sweep net.py:build --target 8", levers=(LORA,))
    assert swept.line == "" and "lora: rank 16, attention" in swept.text
    typed = asked("autobatch probe net.py:build --target 8 --lora r=16", levers=(LORA,))
    assert "--lora r=16" in typed.line


def test_cards_that_cannot_multiply_in_the_plans_format_are_not_offered() -> None:
    command = "autobatch probe net.py:build --target 8 --precision bf16-pure"
    halves = dataclasses.replace(LORA, lever="precision", value="bf16 weights")
    assert "t4" in asked(command).line.split("--gpus ")[1].split(",")
    assert "t4" not in asked(command, levers=(halves,)).line.split("--gpus ")[1].split(",")


def test_a_plan_of_python_code_is_asked_about_in_python() -> None:
    plan = example_plan()
    found = asked(None)
    names: dict[str, Any] = {}

    class Stub:
        @staticmethod
        def compare(model: object, **options: Any) -> None:
            names.update(options)

    exec(found.line, {"autobatch": Stub, "model": None, "options": {"loss": "theirs"}})
    assert names.pop("gpus") and "a100-40gb" not in found.line
    assert names == {
        "target": plan.target,
        "headroom": plan.headroom,
        "autocast": "bf16",
        "clip_norm": 1.0,
        "loss": "theirs",
    }
    ranks = asked(None, sharding="fsdp", model=dataclasses.replace(plan.model, autocast=None))
    assert "sharding='fsdp'" in ranks.line and "autocast" not in ranks.line
    assert asked(None, levers=(LORA,)).line == ""


def test_each_option_of_the_commands_is_either_kept_or_dropped() -> None:
    """An option that is added has to be put into one of the two."""
    verbs: Any = next(
        each for each in parser()._actions if isinstance(each, argparse._SubParsersAction)
    )
    of = {name: each._actions for name, each in verbs.choices.items()}
    there = {
        option: action
        for verb in ("probe", "sweep")
        for action in of[verb]
        for option in action.option_strings
        if action.dest not in ("help", "config")
    }
    assert there.keys() == KEPT.keys() | DROPPED.keys()
    for option, action in there.items():
        takes = {0: False, "?": None}.get(action.nargs, True)
        assert (KEPT | DROPPED)[option] is takes, option
    compares = {option for action in of["compare"] for option in action.option_strings}
    assert KEPT.keys() <= compares
