"""Options are there where they make sense, and nowhere else."""

from __future__ import annotations

import ast
import copy
import importlib.util
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import autobatch
from autobatch.devices.virtual.gpu import VirtualGpu
from autobatch.errors import DoesNotFitError, LeverError, UsageError, WorkloadError
from autobatch.levers.code import ModelCode, OptimizerCode
from autobatch.levers.known import LEVERS, levers_named
from autobatch.levers.lever import Lever, Option, applied
from autobatch.levers.lora import LORA, lora
from autobatch.levers.naming import blocks_in_order, expression_of
from autobatch.memory.allocator_settings import AllocatorSettings
from autobatch.tuning.planning import plan_of, probe_of
from autobatch.workload.sample import batch_builder
from autobatch.workload.workload import Workload
from tests.levers.setups import (
    CLASSES,
    DEPTH,
    SAMPLES,
    WIDTH,
    by_hand,
    convnet,
    executed,
    llama,
    options_of,
    peaks,
    setup_of,
    squared,
    transformer,
    with_instance,
)


def of_lever(name: str, workload: Workload, **where) -> list[str]:
    return [option.value for option in LEVERS[name].options(setup_of(workload, **where))]


def test_a_model_without_blocks_is_not_checkpointed() -> None:
    plain = Workload(model=nn.Linear(4, 4), batch=batch_builder(torch.ones(2, 4)))
    assert of_lever("checkpointing", plain) == []
    assert of_lever("checkpointing", transformer())[:3] == [
        "every block",
        "every 2nd block",
        "every 3rd block",
    ]


def test_a_model_that_is_checkpointed_already_is_not_again() -> None:
    workload = llama()
    workload.model.gradient_checkpointing = True
    assert of_lever("checkpointing", workload) == []


@pytest.mark.parametrize("name", ["checkpointing", "loss", "lora", "precision"])
def test_a_lever_that_has_been_applied_is_not_offered_again(name: str) -> None:
    setup = setup_of(llama())
    for option in LEVERS[name].options(setup):
        if option.value not in ("bf16 autocast", "fp16 autocast", "tf32"):
            assert LEVERS[name].options(option.apply(setup)) == []


def test_attention_alone_is_kept_only_where_a_fused_kernel_runs() -> None:
    assert "selective, attention" in of_lever("checkpointing", transformer())
    assert "selective, attention" not in of_lever("checkpointing", convnet())
    assert "selective, attention" not in of_lever(
        "checkpointing", llama(attn_implementation="eager")
    )


@pytest.mark.parametrize(
    ("gpu", "others"),
    [("a100-40gb", ["memory-efficient", "cudnn"]), ("h100-80gb", ["flash", "memory-efficient"])],
)
def test_other_kernels_of_attention_are_offered_in_half_precision(
    gpu: str, others: list[str]
) -> None:
    halves = replace(llama(), autocast="bf16")
    assert of_lever("attention-kernel", halves, gpu=gpu) == others
    assert of_lever("attention-kernel", halves, gpu="t4") == []
    assert of_lever("attention-kernel", llama(), gpu=gpu) == []
    assert of_lever("attention-kernel", replace(convnet(), autocast="bf16"), gpu=gpu) == []
    setup = setup_of(halves, gpu)
    for option in LEVERS["attention-kernel"].options(setup):
        assert LEVERS["attention-kernel"].options(option.apply(setup)) == []


def test_formats_are_those_that_the_card_and_the_model_leave_open() -> None:
    assert of_lever("precision", transformer(), gpu="t4") == ["fp16 autocast"]
    assert of_lever("precision", transformer()) == [
        "bf16 autocast",
        "fp16 autocast",
        "tf32",
        "bf16 weights",
    ]
    casting = replace(transformer(), autocast="bf16")
    assert of_lever("precision", casting) == ["fp16 autocast", "fp32", "bf16 weights"]
    halves = transformer()
    halves.model.to(torch.bfloat16)
    assert of_lever("precision", halves) == []
    for workload, says_so in ((casting, True), (transformer(), False)):
        code = options_of(setup_of(workload))["precision: bf16 weights"].code
        assert ("leave torch.autocast and GradScaler out" in code) == says_so


def test_tf32_is_a_property_of_the_setup() -> None:
    setup = setup_of(transformer())
    option = options_of(setup)["precision: tf32"]
    assert not setup.tf32 and option.apply(setup).tf32
    assert peaks(option.apply(setup)) == peaks(setup)


def test_channels_last_is_for_convolutions_that_are_not() -> None:
    assert of_lever("memory-format", transformer()) == []
    assert of_lever("memory-format", convnet()) == ["channels last"]
    workload = convnet()
    workload.model.to(memory_format=torch.channels_last)
    assert of_lever("memory-format", workload) == []


def test_the_other_ways_of_an_optimizer_are_offered() -> None:
    def ways(optimizer):
        return of_lever("optimizer", replace(transformer(), optimizer=optimizer))[:2]

    assert ways(torch.optim.AdamW) == ["for-loop", "fused"]
    assert ways(partial(torch.optim.AdamW, fused=True)) == ["foreach", "for-loop"]
    assert ways(partial(torch.optim.AdamW, foreach=False)) == ["foreach", "fused"]
    assert ways(lambda params: torch.optim.AdamW(params, lr=1e-4, fused=True)) == [
        "foreach",
        "for-loop",
    ]
    assert ways(partial(torch.optim.RMSprop, lr=0.1)) == ["for-loop", "Adafactor"]


def test_an_optimizer_keeps_its_settings() -> None:
    workload = replace(transformer(), optimizer=partial(torch.optim.AdamW, lr=0.5, foreach=True))
    options = options_of(setup_of(workload))
    assert (
        "torch.optim.AdamW(model.parameters(), lr=0.5, fused=True)"
        in options["optimizer: fused"].code
    )
    given = with_instance(transformer())
    made = options_of(setup_of(given))["optimizer: fused"].apply(setup_of(given))
    optimizer = made.workload.optimizer(given.model)
    assert optimizer.param_groups[0]["lr"] == 3e-4 and optimizer.param_groups[0]["fused"]
    assert optimizer is not given.optimizer and not given.optimizer.param_groups[0]["fused"]


def test_several_optimizers_and_unknown_ones_are_left_alone() -> None:
    workload = transformer()
    several = [torch.optim.SGD(p for p in workload.model.layers.parameters()), torch.optim.SGD]
    assert of_lever("optimizer", replace(workload, optimizer=several)) == []
    assert of_lever("optimizer", replace(workload, optimizer=lambda model: 1 / 0)) == []


def test_eight_bits_are_those_of_a_library_that_is_installed(monkeypatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not [value for value in of_lever("optimizer", transformer()) if "8-bit" in value]
    assert of_lever("lora", transformer()) == []
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: found("torch") if name == "torchao" else None
    )
    assert "8-bit (torchao)" in of_lever("optimizer", transformer())


@pytest.mark.parametrize("options", [{"clip_norm": 1.0}, {"autocast": "fp16"}, {"world_size": 2}])
def test_no_optimizer_steps_in_a_backward_pass_whose_gradients_are_not_final(options) -> None:
    assert "in backward" in of_lever("optimizer", transformer())
    assert "in backward" not in of_lever("optimizer", replace(transformer(), **options))


def test_an_optimizer_in_the_backward_pass_needs_all_samples_at_once() -> None:
    layers = [nn.Linear(2048, 2048) for _ in range(3)]
    workload = Workload(
        model=nn.Sequential(*layers), batch=batch_builder(torch.ones(2, 2048)), loss=squared
    )
    setup = options_of(setup_of(workload, "t4"))["optimizer: in backward"].apply(
        setup_of(workload, "t4")
    )
    device = VirtualGpu(setup.gpu, setup.settings)
    plan = plan_of(probe_of(setup.workload, device, target=300), target=300)
    assert (plan.micro_batch, plan.accumulation_steps) == (300, 1)
    target = 2**22
    with pytest.raises(DoesNotFitError, match="all samples of an update at once"):
        plan_of(probe_of(setup.workload, device, target=target), target=target)
    with pytest.raises(WorkloadError, match="once for each micro-batch"):
        device.run(setup.workload, micro_batch=2, accumulation_steps=2)


def test_lora_takes_ranks_and_layers_of_ones_own() -> None:
    pytest.importorskip("peft")
    setup = setup_of(llama())
    lever = lora(ranks=[4, 64], modules=["q_proj", "down_proj"])
    thin, thick = lever.options(setup)
    assert (thin.value, thick.value) == (
        "rank 4, q_proj, down_proj",
        "rank 64, q_proj, down_proj",
    )
    assert peaks(thin.apply(setup)) < peaks(thick.apply(setup)) < peaks(setup)
    assert lora(modules=["nothing"]).options(setup) == []
    with pytest.raises(UsageError, match="rank of LoRA is 0"):
        lora(ranks=[0])


class NumberedLayers(nn.Module):
    """Linear layers have the names of blocks: "0" is a layer in each block, and a block."""

    def __init__(self) -> None:
        super().__init__()
        parts = (nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
        self.body = nn.Sequential(*(nn.Sequential(*copy.deepcopy(parts)) for _ in range(DEPTH)))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def test_lora_names_layers_in_full_that_share_a_name_with_what_is_no_layer() -> None:
    pytest.importorskip("peft")
    sample = torch.randn(SAMPLES, WIDTH)
    setup = setup_of(Workload(model=NumberedLayers(), batch=batch_builder(sample), loss=squared))
    (option,) = lora(ranks=[2]).options(setup)
    assert option.value == "rank 2, all linear"
    adapted = executed(option.code, model=NumberedLayers())["model"]
    names = {name for name, part in adapted.named_modules() if hasattr(part, "lora_A")}
    assert names == {
        f"base_model.model.body.{block}.{layer}" for block in range(DEPTH) for layer in (0, 2)
    }
    assert peaks(option.apply(setup)) != peaks(setup)


def test_lora_makes_the_users_optimizer_anew_over_the_adapters() -> None:
    pytest.importorskip("peft")
    plain, given = setup_of(llama()), setup_of(with_instance(llama()))
    option = options_of(given)["lora: rank 16, all linear"]
    assert peaks(option.apply(given)) == peaks(
        options_of(plain)["lora: rank 16, all linear"].apply(plain)
    )
    model = given.workload.model
    groups = [{"params": list(model.model.parameters())}, {"params": [model.lm_head.weight]}]
    halves = replace(given.workload, optimizer=torch.optim.AdamW(groups))
    assert of_lever("lora", halves) == []  # which group an adapter belongs to is not known


def test_a_loss_of_the_users_own_is_not_replaced() -> None:
    assert of_lever("loss", llama()) == ["8 chunks"]
    assert of_lever("loss", replace(llama(), loss=lambda model, batch: model(**batch).loss)) == []
    assert of_lever("loss", transformer()) == []


def test_sharing_is_for_several_gpus() -> None:
    assert of_lever("sharding", transformer()) == []
    shared = replace(transformer(), world_size=2)
    assert of_lever("sharding", shared) == [
        "FSDP2",
        "DDP, gradients in its buckets",
        "FSDP2, offloaded",
        "FSDP2 in bfloat16",
        "FSDP2, kept after forward",
    ]
    assert of_lever("sharding", replace(shared, sharding="fsdp")) == [
        "DDP",
        "DDP, gradients in its buckets",
        "FSDP2, offloaded",
        "FSDP2 in bfloat16",
        "FSDP2, kept after forward",
    ]
    assert of_lever("sharding", replace(shared, sharding=lambda model: None)) == []


def test_gathers_in_bfloat16_take_the_place_of_autocast() -> None:
    shared = replace(transformer(), world_size=2)
    option = options_of(setup_of(shared))["sharding: FSDP2 in bfloat16"]
    assert option.changes_numerics and "autocast" not in option.code
    assert not option.goes_with(options_of(setup_of(shared))["precision: bf16 autocast"])
    half = setup_of(replace(shared, autocast="bf16"))
    applied_to_half = options_of(half)["sharding: FSDP2 in bfloat16"]
    assert "leave torch.autocast" in applied_to_half.code
    assert applied_to_half.apply(half).workload.autocast is None
    assert "FSDP2 in bfloat16" not in of_lever("sharding", shared, gpu="t4")
    double = replace(shared, model=transformer().model.double())
    assert "FSDP2 in bfloat16" not in of_lever("sharding", double)


@pytest.mark.slow
@pytest.mark.parametrize(
    "value", ["FSDP2", "FSDP2, offloaded", "FSDP2 in bfloat16", "FSDP2, kept after forward"]
)
def test_sharing_by_hand_takes_what_was_promised(value: str) -> None:
    def shared() -> Workload:
        return replace(transformer(), world_size=2)

    option = options_of(setup_of(shared()))[f"sharding: {value}"]
    promised = peaks(option.apply(setup_of(shared())))
    assert peaks(by_hand(option, shared)) == promised
    assert promised[0] < peaks(setup_of(shared()))[0]


def test_less_is_on_the_card_when_it_is_offloaded() -> None:
    setup = setup_of(transformer())
    options = options_of(setup)
    assert peaks(options["offload: activations"].apply(setup))[0] < peaks(setup)[0]
    clipped = setup_of(replace(transformer(), clip_norm=1.0))
    assert "offload: optimizer state" not in options_of(clipped)
    if importlib.util.find_spec("torchao") is not None:
        assert peaks(options["offload: optimizer state"].apply(setup))[0] < peaks(setup)[0]


def test_expandable_segments_are_offered_where_they_are_off() -> None:
    setup = setup_of(transformer())
    [option] = LEVERS["allocator"].options(setup)
    assert option.apply(setup).settings == AllocatorSettings(expandable_segments=True)
    assert LEVERS["allocator"].options(option.apply(setup)) == []


def test_options_that_exclude_each_other_are_refused() -> None:
    setup = setup_of(transformer())
    options = options_of(setup)
    pairs = [
        ("optimizer: fused", "optimizer: for-loop"),
        ("precision: fp16 autocast", "optimizer: in backward"),
    ]
    for first, second in pairs:
        assert not options[first].goes_with(options[second])
        with pytest.raises(UsageError, match="cannot be combined"):
            applied(setup, (options[first], options[second]))
    assert options["precision: bf16 autocast"].goes_with(options["optimizer: in backward"])


@pytest.mark.slow
def test_levers_go_together() -> None:
    pytest.importorskip("peft")
    setup = setup_of(llama())
    options = options_of(setup)
    labels = (
        "precision: bf16 autocast",
        "loss: 8 chunks",
        "lora: rank 16, all linear",
        "checkpointing: every block",
        "optimizer: fused",
        "allocator: expandable segments",
    )
    smallest = peaks(setup)
    for count in range(1, len(labels) + 1):
        together = peaks(applied(setup, [options[label] for label in labels[:count]]))
    assert together[0] < 0.7 * smallest[0]


def _halved(setup):
    return setup.changed(lambda model: model.half() and None)


HALVES = Lever(
    name="halves",
    what="Half precision.",
    options=lambda setup: [
        Option(lever="halves", value="all", what="", code="model.half()", apply=_halved)
    ],
)


def test_a_lever_of_ones_own_is_taken_where_names_are() -> None:
    found = levers_named([HALVES, "loss", lora(ranks=[2])])
    assert [lever.name for lever in found] == ["loss", "lora", "halves"]
    assert found[1] is not LEVERS["lora"]
    workload = llama()
    [option] = HALVES.options(setup_of(workload))
    assert peaks(option.apply(setup_of(workload))) < peaks(setup_of(workload))


def test_an_unknown_lever_is_named_with_those_that_there_are() -> None:
    with pytest.raises(UsageError, match=r"no lever 'checkpoint'.*checkpointing.*levers: "):
        levers_named(["checkpoint"])


def test_code_that_fails_says_which() -> None:
    setup = setup_of(transformer()).changed(ModelCode("own", "model.no_such_thing()"))
    with pytest.raises(WorkloadError, match=r"'model.no_such_thing\(\)' failed"):
        peaks(setup)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft's
def test_lora_beside_checkpoints_is_the_same_in_either_order() -> None:
    pytest.importorskip("peft")
    setup = setup_of(transformer())
    checkpointing = options_of(setup)["checkpointing: every block"]
    checkpointed = checkpointing.apply(setup)
    (first,) = lora(ranks=[2], modules=["fc1"]).options(setup)
    (later,) = lora(ranks=[2], modules=["fc1"]).options(checkpointed)

    assert later.code.startswith("# before activation checkpointing")
    both = peaks(later.apply(checkpointed))
    assert both == peaks(checkpointing.apply(first.apply(setup)))
    assert both < peaks(first.apply(setup))


@pytest.mark.parametrize(
    "settings",
    [
        {"lr": np.float64(0.001), "betas": (np.float64(0.5), 0.75), "amsgrad": np.bool_(True)},
        {"lr": torch.tensor(0.001)},
        {"lr": float("inf")},  # has no form that code can write
    ],
    ids=["numpy", "tensor", "infinite"],
)
def test_settings_that_are_no_plain_numbers_give_lines_that_run(settings: dict[str, Any]) -> None:
    setup = setup_of(transformer()).having(optimizer=partial(torch.optim.AdamW, **settings))
    labels = ["optimizer: for-loop", "optimizer: fused", "optimizer: in backward"]
    options = options_of(setup)
    if "offload: optimizer state" in options:  # where torchao is installed
        labels.append("offload: optimizer state")
    for label in labels:
        code = options[label].code
        assert "tensor(" not in code and "np." not in code
        if label.startswith("offload"):  # which asks for a card at once
            ast.parse(code)
            continue
        given = setup.workload.optimizer(setup.model.parameters())
        names = executed(code, model=setup.model, optimizer=given)
        made = names["optimizers"].values() if "optimizers" in names else [names["optimizer"]]
        rates = {group["lr"] for one in made for group in one.param_groups}
        assert rates == {float(settings["lr"])}


def test_frozen_parameters_of_an_optimizer_are_not_stepped_in_the_backward_pass() -> None:
    workload = transformer()
    workload.model.layers[0].requires_grad_(False)
    setup = setup_of(with_instance(workload))
    option = options_of(setup)["optimizer: in backward"]
    allocated, _ = peaks(option.apply(setup), steps=1)
    assert allocated > 0
    names = executed(option.code, model=workload.model, optimizer=setup.workload.optimizer)
    trained = {id(p) for p in workload.model.parameters() if p.requires_grad}
    assert set(map(id, names["optimizers"])) == trained


@pytest.mark.parametrize(
    "wrong",
    [
        {"changes": (ModelCode("mine", "blocks = [*model.layers]\nmodel.nothing()"),)},
        {"optimizer": OptimizerCode("optimizer = [*model.parameters()][0].none", torch.optim.SGD)},
        {
            "optimizer": OptimizerCode(
                "optimizers = {one: 1 / 0 for one in model.parameters()}", torch.optim.SGD
            )
        },
    ],
    ids=["attribute", "optimizer", "optimizers"],
)
def test_lines_that_fail_leave_nothing_of_the_simulation(wrong: dict[str, Any]) -> None:
    with pytest.raises(WorkloadError, match="failed: ") as error:
        peaks(setup_of(replace(transformer(), **wrong)))
    assert "simulation" not in str(error.value)


def test_windows_that_an_optimizer_in_the_backward_pass_refuses_leave_nothing() -> None:
    setup = setup_of(transformer())
    option = options_of(setup)["optimizer: in backward"]
    with pytest.raises(LeverError, match="once for each micro-batch") as error:
        VirtualGpu(setup.gpu).run(
            option.apply(setup).workload, micro_batch=SAMPLES, accumulation_steps=2
        )
    assert "simulation" not in str(error.value)


def test_layers_that_have_numbers_are_named_in_full() -> None:
    pytest.importorskip("peft")
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Sequential(nn.Linear(8, 8)))
    (option,) = LORA.options(setup_of(Workload(model=model, batch=lambda n: torch.zeros(n, 8))))
    assert "beside layers 0 and 2.0:" in option.what


def test_a_name_alone_is_one_lever() -> None:
    assert levers_named("precision") == levers_named(["precision"])
    with pytest.raises(UsageError, match=r"no lever 'precison' .did you mean precision"):
        levers_named("precison")


@pytest.mark.parametrize("compares", [nn.CrossEntropyLoss(), None], ids=["stated", "inferred"])
def test_lora_can_be_had_where_a_batch_is_a_pair(compares: Any) -> None:
    pytest.importorskip("peft")
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    pair = (torch.zeros(2, 8), torch.zeros(2).long())
    advice = autobatch.advise(
        model, sample=pair, target=8, gpu="t4", levers=["lora"], loss=compares
    )
    assert [choice.label for choice in advice.choices] == ["lora: rank 16, all linear"]
    assert not [note for note in advice.notes if "cannot be had" in note]


def parts_of_two() -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, CLASSES))


@pytest.mark.parametrize("label", ["optimizer: SGD", "optimizer: Adafactor"])
def test_another_optimizer_updates_what_the_users_own_does(label: str) -> None:
    model = parts_of_two()
    optimizer = torch.optim.AdamW(model[2].parameters(), lr=0.1)
    run = Workload(model=model, batch=lambda n: torch.ones(n, WIDTH), loss=squared)
    option = options_of(setup_of(replace(run, optimizer=optimizer)))[label]
    made = executed(option.code, model=model, optimizer=optimizer)["optimizer"]
    assert [id(p) for group in made.param_groups for p in group["params"]] == [
        id(p) for p in model[2].parameters()
    ]
    whole = replace(run, optimizer=torch.optim.AdamW(model.parameters()))
    assert "(model.parameters()" in options_of(setup_of(whole))[label].code


def test_an_optimizer_that_has_stepped_is_said_to_be_made_anew() -> None:
    model = parts_of_two()
    optimizer = torch.optim.AdamW(model.parameters())
    run = Workload(
        model=model, batch=lambda n: torch.ones(n, WIDTH), loss=squared, optimizer=optimizer
    )
    labels = ["optimizer: for-loop", "optimizer: fused", "optimizer: in backward"]
    fresh = options_of(setup_of(run))
    assert not any(fresh[label].changes_numerics for label in labels)
    squared(model, torch.ones(2, WIDTH)).backward()
    optimizer.step()
    stepped = options_of(setup_of(run))
    assert all(stepped[label].changes_numerics for label in labels)
    assert all("without the state that yours has" in stepped[label].what for label in labels)


def test_every_nth_block_is_counted_in_the_order_of_the_model() -> None:
    def block() -> nn.Module:
        return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU())

    stages = nn.ModuleList([block(), nn.ModuleDict({"body": nn.Sequential(block(), block())})])
    stages.extend([block(), block()])
    model = nn.Module()
    model.stages = stages
    blocks = blocks_in_order(model)
    assert len(blocks) == 5
    named = eval(expression_of(model, blocks), {"model": model})
    assert [id(one) for one in named] == [id(one) for one in blocks.values()]
