"""Advice: what levers do, told by the plans of changed workloads."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import autobatch
from autobatch import DoesNotFitError, GpuSpec, UsageError, Workload, find_gpu
from autobatch.gpus.catalogue import CATALOGUE
from autobatch.levers.known import LEVERS
from autobatch.levers.lever import Lever, Option, applied
from autobatch.levers.setup import Setup
from autobatch.plan.advice import Advice, Choice
from autobatch.support.units import MIB
from autobatch.tuning.advise import advise

FEW = ["precision", "checkpointing"]


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.rise, self.fall = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.fall(torch.relu(self.rise(x)))


def stack(width: int = 256, depth: int = 6) -> nn.Module:
    return nn.Sequential(*[Block(width) for _ in range(depth)])


def workload(**changes: object) -> Workload:
    given = {"model": stack(), "batch": lambda n: torch.zeros(n, 512, 256)}
    return Workload(**given | changes)


def card(mib: int) -> GpuSpec:
    return replace(find_gpu("a100-40gb"), name="small", capacity_bytes=mib * MIB, context_bytes=0)


@functools.cache
def advised(mib: int, *, allow_numerics: bool) -> Advice:
    return advise(workload(), target=64, gpu=card(mib), levers=FEW, allow_numerics=allow_numerics)


@functools.cache
def heavy() -> Workload:
    """A run whose weights, gradients and moments take more than `card(1000)` has."""
    return Workload(model=stack(1024, 12), batch=lambda n: torch.zeros(n, 64, 1024))


def options_of(training: Workload, gpu: GpuSpec, levers: list[str]) -> dict[str, Option]:
    setup = Setup(workload=training, gpu=gpu)
    return {o.label: o for name in levers for o in LEVERS[name].options(setup)}


@pytest.mark.slow
@pytest.mark.parametrize("mib", [150, 4000])
def test_every_ceiling_is_that_of_the_plan_for_the_changed_workload(mib: int) -> None:
    training, advice = workload(), advised(mib, allow_numerics=True)
    options = options_of(training, card(mib), FEW)
    assert {label for choice in advice.choices for label in choice.options} == set(options)
    for choice in (advice.as_it_is, *advice.choices):
        setup = applied(
            Setup(workload=training, gpu=card(mib)), [options[label] for label in choice.options]
        )
        if choice.fits:
            plan = autobatch.tune(setup.workload, target=64, gpu=setup.gpu)
            assert choice.ceiling == plan.ceiling_at_least
            assert choice.micro_batch == plan.micro_batch
            assert choice.accumulation_steps == plan.accumulation_steps
            assert choice.likelihood == plan.likelihood
        else:
            with pytest.raises(DoesNotFitError):
                autobatch.tune(setup.workload, target=64, gpu=setup.gpu)


@pytest.mark.slow
def test_what_is_saved_is_reserved_memory_at_the_reference() -> None:
    training, gpu = workload(), card(4000)
    advice = advise(training, target=64, gpu=gpu, levers=["checkpointing"])
    (choice,) = [c for c in advice.choices if c.label == "checkpointing: every block"]
    option = options_of(training, gpu, ["checkpointing"])[choice.label]
    changed = option.apply(Setup(workload=training, gpu=gpu)).workload
    assert advice.reference == advice.as_it_is.micro_batch == 64
    steps = advice.as_it_is.accumulation_steps

    def reserved(of: Workload) -> int:
        given = {"micro_batch": 64, "accumulation_steps": max(steps, 2), "gpu": gpu}
        return autobatch.predict(of, **given).peak_reserved_bytes

    assert choice.saved_bytes == reserved(training) - reserved(changed) > 0


@pytest.mark.slow
def test_what_changes_numbers_is_combined_only_where_asked_for() -> None:
    def together(allow: bool) -> list[Choice]:
        advice = advised(4000, allow_numerics=allow)
        alone = [choice for choice in advice.choices if len(choice.options) == 1]
        assert any(choice.changes_numerics for choice in alone)
        return [choice for choice in advice.choices if len(choice.options) > 1]

    assert not any(choice.changes_numerics for choice in together(allow=False))
    assert any(choice.changes_numerics for choice in together(allow=True))


@pytest.mark.slow
def test_choices_that_fit_come_first_and_the_fastest_of_them_at_the_top() -> None:
    advice = advised(150, allow_numerics=True)
    fits = [choice.fits for choice in advice.choices]
    assert fits == sorted(fits, reverse=True)
    seconds = [c.window_seconds for c in advice.fitting if c.window_seconds is not None]
    assert seconds == sorted(seconds)


@pytest.mark.slow
def test_what_it_would_take_was_tried() -> None:
    training, small = heavy(), card(1000)
    advice = advise(training, target=8, gpu=small, levers=[])
    assert not advice.as_it_is.fits and not advice.choices
    needs = {need.what: need for need in advice.needs}
    larger = needs["a larger card"]
    assert autobatch.tune(training, target=8, gpu=larger.value).ceiling_at_least >= 1
    for other in CATALOGUE.values():
        if small.capacity_bytes < other.capacity_bytes < CATALOGUE[larger.value].capacity_bytes:
            with pytest.raises(DoesNotFitError):
                autobatch.tune(training, target=8, gpu=other)
    ranks = int(needs["cards with FSDP2"].value.split()[0])
    shared = {"target": 8, "gpu": small, "sharding": "fsdp"}
    assert autobatch.tune(training, world_size=ranks, **shared).ceiling_at_least >= 1
    with pytest.raises(DoesNotFitError):
        autobatch.tune(training, world_size=ranks // 2, **shared)


@pytest.mark.slow
def test_the_longest_sequence_that_fits_is_looked_for() -> None:
    def of_length(length: int) -> Workload:
        return workload(batch=lambda n: torch.zeros(n, length, 256))

    gpu = card(150)
    advice = advise(of_length(8192), target=8, gpu=gpu, levers=[], resized=("seq", 8192, of_length))
    (need,) = [need for need in advice.needs if need.what.startswith("seq")]
    longest = int(need.value.replace(",", ""))
    assert longest < 8192
    autobatch.tune(of_length(longest), target=8, gpu=gpu)
    with pytest.raises(DoesNotFitError):
        autobatch.tune(of_length(longest + 8192 // 16), target=8, gpu=gpu)


@pytest.mark.slow
def test_the_error_says_what_would_let_it_fit() -> None:
    training = workload(batch=lambda n: torch.zeros(n, 4096, 256))
    with pytest.raises(DoesNotFitError, match="it would fit with") as caught:
        autobatch.tune(training, target=64, gpu=card(320))
    message = str(caught.value)
    assert "checkpointing" in message and "\n" not in message


@pytest.mark.slow
def test_the_users_model_stays_as_it_is() -> None:
    model = stack()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kinds = [type(module) for module in model.modules()]
    advise(model, sample=torch.zeros(2, 512, 256), target=16, gpu=card(400), allow_numerics=True)
    assert [type(module) for module in model.modules()] == kinds
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_lever_of_ones_own_is_tried_like_the_others() -> None:
    def halved(model: nn.Module) -> nn.Module:
        assert isinstance(model, nn.Sequential)
        return model[: len(model) // 2]

    def options(setup: Setup) -> list[Option]:
        return [
            Option(
                lever="depth",
                value="half",
                what="Half of the blocks.",
                code="model = model[: len(model) // 2]",
                changes_numerics=True,
                apply=lambda setup: setup.changed(halved),
            )
        ]

    own = Lever(name="depth", what="How many blocks there are.", options=options)
    advice = advise(workload(), target=64, gpu=card(4000), levers=[own])
    (choice,) = advice.choices
    assert choice.label == "depth: half" and choice.saved_bytes > 0
    assert choice.ceiling > advice.as_it_is.ceiling


@pytest.mark.slow
def test_an_option_that_fails_is_noted_and_the_rest_goes_on() -> None:
    def broken(model: nn.Module) -> nn.Module:
        raise RuntimeError("no such thing")

    def options(setup: Setup) -> list[Option]:
        return [
            Option(
                lever="own", value="broken", what="-", code="-",
                apply=lambda setup: setup.changed(broken),
            )
        ]  # fmt: skip

    own = Lever(name="own", what="-", options=options)
    advice = advise(workload(), target=64, gpu=card(4000), levers=[own, "checkpointing"])
    assert any("own: broken" in note and "no such thing" in note for note in advice.notes)
    assert any("checkpointing" in choice.label for choice in advice.choices)


@pytest.mark.slow
def test_a_lever_that_fails_is_noted_and_the_rest_goes_on() -> None:
    def options(setup: Setup) -> list[Option]:
        raise AttributeError("no such layer")

    own = Lever(name="own", what="-", options=options)
    advice = advise(workload(), target=64, gpu=card(4000), levers=[own, "checkpointing"])
    assert any("own was left out" in note and "no such layer" in note for note in advice.notes)
    assert any("checkpointing" in choice.label for choice in advice.choices)


def mine(apply: Any) -> Lever:
    options = [Option(lever="mine", value="on", what="", code="", apply=apply)]
    return Lever(name="mine", what="", options=lambda setup: options)


def test_an_option_that_raises_is_noted() -> None:
    def failing(setup: Setup) -> Setup:
        raise KeyError("layer")

    advice = advise(workload(), target=4, gpu=card(4000), levers=[mine(failing)])
    assert any("the lever mine raised KeyError: 'layer'" in note for note in advice.notes)
    assert advice.choices == ()


def test_a_lever_that_is_wrong_is_told() -> None:
    def frozen(setup: Setup) -> Setup:
        setup.model[0].requires_grad_(False)
        return setup

    def frozen_in_a_run(setup: Setup) -> Setup:
        return setup.changed(lambda copy: frozen(setup) and None)

    training = workload()
    wrong = {
        "the lever mine made a NoneType of a Setup": mine(lambda setup: None),
        "the lever mine changed what you train in place": mine(frozen),
        "a run with mine: on changed what you train in place": mine(frozen_in_a_run),
        "the lever none offered a NoneType": Lever(name="none", what="", options=lambda _: None),
    }
    for said, lever in wrong.items():
        with pytest.raises(UsageError, match=said):
            advise(training, target=4, gpu=card(4000), levers=[lever])
    assert all(parameter.requires_grad for parameter in training.model.parameters())


@pytest.mark.slow
def test_options_may_have_another_name_than_their_lever() -> None:
    clipped = mine(lambda setup: setup.having(clip_norm=1.0))
    own = Lever(name="own", what="", options=clipped.options)
    advice = advise(workload(), target=64, gpu=card(150), levers=[own, "checkpointing"])
    assert any(choice.label == "mine: on" for choice in advice.choices)


def test_an_unknown_lever_names_the_one_that_was_meant() -> None:
    with pytest.raises(UsageError, match="checkpointing"):
        advise(workload(), target=8, gpu="t4", levers=["checkpoint"])


@pytest.mark.slow
def test_an_advice_survives_json_and_prints_its_lines_of_code() -> None:
    advice = advised(150, allow_numerics=True)
    assert Advice.from_json(advice.to_json()) == advice
    text = str(advice)
    assert "as it is" in text
    for choice in advice.fitting[:3]:
        assert all(line in text for code in choice.code for line in code.splitlines())


def test_tf32_costs_no_memory_and_less_time() -> None:
    before = torch.get_float32_matmul_precision()
    advice = advise(workload(), target=64, gpu="a100-40gb", levers=["precision"])
    (choice,) = [choice for choice in advice.choices if choice.options == ("precision: tf32",)]
    assert choice.saved_bytes == 0
    slowdown = advice.slowdown(choice)
    assert slowdown is not None and slowdown < 0.9
    assert torch.get_float32_matmul_precision() == before


class TestWhatStateAloneKeepsFromFitting:
    """Of a model whose weights, gradients and moments take more than the card has."""

    @staticmethod
    @functools.cache
    def advised() -> tuple[Advice, list[str]]:
        told: list[str] = []
        advice = advise(
            heavy(),
            target=8,
            gpu=card(1000),
            levers=["precision", "checkpointing", "offload", "optimizer", "allocator"],
            progress=lambda progress: told.append(progress.step),
        )
        return advice, told

    @pytest.mark.slow
    def test_is_not_executed_with_levers_that_keep_it(self) -> None:
        advice, told = self.advised()
        skipped = [choice for choice in advice.choices if not choice.is_executed]
        assert {choice.label for choice in skipped} >= {
            "checkpointing: every block", "precision: bf16 autocast", "optimizer: fused",
        }  # fmt: skip
        kinds = ["precision", "checkpointing", "offload", "optimizer"]
        options = options_of(heavy(), card(1000), kinds)
        for choice in skipped:
            assert not choice.fits and choice.saved_bytes is None and len(choice.options) == 1
            assert f"trying {choice.label}" not in told
            changed = options[choice.label].apply(Setup(workload=heavy(), gpu=card(1000)))
            needed = autobatch.predict(
                changed.workload, micro_batch=1, accumulation_steps=2, gpu=card(1000)
            ).peak_reserved_bytes
            assert advice.budget_bytes < choice.reference_bytes <= needed

    @pytest.mark.slow
    def test_is_executed_with_levers_that_do_not(self) -> None:
        advice, _ = self.advised()
        executed = {c.label: c for c in advice.choices if c.is_executed}
        assert {"precision: bf16 weights", "optimizer: SGD"} <= executed.keys()
        # another allocator replays what was executed as it is
        assert executed["allocator: expandable segments"].saved_bytes is not None
        assert any("checkpointing" in label and " + " in label for label in executed)

    @pytest.mark.slow
    def test_is_told(self) -> None:
        advice, _ = self.advised()
        assert "at least" in str(advice) and "needed no simulation" in str(advice)
        assert Advice.from_json(advice.to_json()) == advice
