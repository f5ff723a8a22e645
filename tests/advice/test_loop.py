"""The printed loop, executed: the loss as the model gave it, and the levers of the plan."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import default_collate

import autobatch
from autobatch.advice.levers import lever_code
from autobatch.advice.loop import training_loop
from autobatch.plan.plan import Plan
from autobatch.records.applied import AppliedLever
from autobatch.support.torch_private import CheckpointWrapper
from tests.levers.setups import RUNS, options_of, setup_of
from tests.support.plans import ragged_plan

ROWS, WIDTH, CLASSES = 16, 6, 3


@pytest.fixture(autouse=True)
def _products_as_before() -> Iterator[None]:
    """Put back what the code of a lever sets for the whole process."""
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


class Classifier(nn.Module):
    """Returns its loss as `read` says: under a key, as an attribute, by itself, or no loss."""

    def __init__(self, read: str, reduction: str = "mean") -> None:
        super().__init__()
        self.layer, self.read, self.reduction = nn.Linear(WIDTH, CLASSES), read, reduction

    def forward(self, x: Tensor, labels: Tensor) -> Any:
        logits = self.layer(x)
        loss = F.cross_entropy(logits, labels, reduction=self.reduction)
        if self.read == "attribute":
            return SimpleNamespace(loss=loss, logits=logits)
        return {"loss": loss, "logits": logits} if self.read == "key" else loss


class Single(Classifier):
    def forward(self, pair: Any) -> Any:
        return super().forward(pair[..., :WIDTH], pair[..., WIDTH].long())


class Logits(nn.Linear):
    """Takes the inputs alone, so that its loss is cross entropy."""


def samples() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(ROWS, WIDTH), torch.randint(CLASSES, (ROWS,))


def run(plan: Plan, model: nn.Module, dataset: Any, **names: Any) -> dict[str, Any]:
    names = {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "dataset": dataset,
        "epochs": 1,
        **names,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(compile(training_loop(plan), "loop", "exec"), names)
    return names


@pytest.mark.parametrize(
    ("read", "reduction"),
    [
        ("key", "mean"),
        ("key", "none"),
        ("attribute", "mean"),
        ("attribute", "none"),
        ("itself", "mean"),
    ],
)
@pytest.mark.parametrize("batch", ["dict", "tuple", "single"])
def test_the_loop_calls_the_model_and_reads_its_loss_as_the_plan_did(
    read: str, reduction: str, batch: str
) -> None:
    x, labels = samples()
    kind = Single if batch == "single" else Classifier
    sample: Any = {
        "dict": {"x": x, "labels": labels},
        "tuple": (x, labels),
        "single": torch.cat((x, labels[:, None].float()), 1),
    }[batch]
    rows = [
        {"x": x[row], "labels": labels[row]}
        if batch == "dict"
        else (x[row], labels[row])
        if batch == "tuple"
        else sample[row]
        for row in range(ROWS)
    ]
    model = kind(read, reduction)
    plan = autobatch.tune(model, target=8, sample=sample, gpu="t4")
    assert Plan.from_json(plan.to_json()).model.loss_code == plan.model.loss_code is not None
    trained = copy.deepcopy(model)
    run(plan, trained, rows)  # there is no loss_fn that it could call
    assert not torch.equal(trained.layer.weight, model.layer.weight)
    asked = eval(plan.model.loss_code, {"model": model, "batch": default_collate(rows)})
    torch.testing.assert_close(asked, F.cross_entropy(model.layer(x), labels))


def test_the_loop_computes_the_cross_entropy_that_was_taken() -> None:
    x, labels = samples()
    model = Logits(WIDTH, CLASSES)
    plan = autobatch.tune(model, target=8, sample=(x, labels), gpu="t4")
    assert plan.model.loss == "cross entropy"
    before = model.weight.detach().clone()
    run(plan, model, list(zip(x, labels, strict=True)))
    assert not torch.equal(before, model.weight)


def test_a_loss_of_the_users_and_one_that_stood_in_are_asked_for() -> None:
    x, _ = samples()
    for options in ({"loss": lambda model, batch: model(batch).sum()}, {}):
        plan = autobatch.tune(nn.Linear(WIDTH, 2), target=8, sample=x, gpu="t4", **options)
        assert plan.model.loss_code is None
        assert "loss = loss_fn(model, batch)" in training_loop(plan)


def had(*labels: str, run: str = "transformer") -> tuple[AppliedLever, ...]:
    """Return levers as plans have them, each made for what those before it left."""
    setup = setup_of(RUNS[run]())
    for label in labels:
        setup = options_of(setup)[label].applied_to(setup)
    return setup.workload.levers


def plan_with(levers: tuple[AppliedLever, ...], **model: Any) -> Plan:
    facts = {"autocast": None, "clip_norm": None, "loss": "user"} | model
    steps = ((2,),) if any(lever.value == "in backward" for lever in levers) else ((2, 2),)
    return dataclasses.replace(ragged_plan(sum(steps[0]), steps, **facts), levers=levers)


LOCAL = [
    (name, label)
    for name in ("transformer", "convnet")
    for label in options_of(setup_of(RUNS[name]()))
    if not label.startswith(("allocator", "offload", "sharding")) and "autocast" not in label
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "label"), LOCAL)
def test_the_loop_runs_with_the_code_of_each_lever(name: str, label: str) -> None:
    workload = RUNS[name]()
    batch, model = workload.batch(4), workload.model
    optimizer = torch.optim.AdamW(model.parameters())
    plan = plan_with(had(label, run=name))
    ran = run(plan, model, list(batch), optimizer=optimizer, loss_fn=workload.loss)
    trained = ran["model"]
    parameters = list(trained.parameters())
    assert all(torch.isfinite(parameter).all() for parameter in parameters)
    expected = {
        "precision: bf16 weights": lambda: {p.dtype for p in parameters} == {torch.bfloat16},
        "checkpointing: every 2nd block": lambda: (
            sum(isinstance(module, CheckpointWrapper) for module in trained.modules()) == 2
        ),
        "memory-format: channels last": lambda: ran["batch"].is_contiguous(
            memory_format=torch.channels_last
        ),
        "optimizer: SGD": lambda: type(ran["optimizer"]) is torch.optim.SGD,
        "optimizer: in backward": lambda: (
            not optimizer.state and all(one.state for one in ran["optimizers"].values())
        ),
    }
    assert expected.get(label, lambda: True)()


def test_levers_stand_in_the_loop_in_the_order_in_which_they_were_applied() -> None:
    pytest.importorskip("peft")
    levers = had(
        "precision: bf16 weights",
        "lora: rank 16, all linear",
        "checkpointing: selective",
        "optimizer: for-loop",
    )
    plan = plan_with(levers)
    loop = training_loop(plan)
    places = [loop.index(f"# {lever.label}") for lever in levers]
    assert places == sorted(places) and max(places) < loop.index("for epoch in")
    workload = RUNS["transformer"]()
    ran = run(plan, workload.model, list(workload.batch(4)), loss_fn=workload.loss)
    changed = [p for group in ran["optimizer"].param_groups for p in group["params"]]
    learned = [p for p in changed if p.grad is not None or p in ran["optimizer"].state]
    assert learned and all(p.requires_grad for p in learned)


def test_lora_without_another_optimizer_gets_one_over_what_is_trained() -> None:
    pytest.importorskip("peft")
    workload = RUNS["transformer"]()
    plan = plan_with(had("lora: rank 16, all linear"))
    ran = run(plan, workload.model, list(workload.batch(4)), loss_fn=workload.loss)
    held = {id(p) for group in ran["optimizer"].param_groups for p in group["params"]}
    assert held == {id(p) for p in ran["model"].parameters() if p.requires_grad}


def test_a_kernel_is_chosen_around_the_loop_and_the_allocator_before_torch() -> None:
    kernel = next(
        label for label in options_of(setup_of(RUNS["half llama"]())) if "kernel" in label
    )
    loop = training_loop(plan_with(had(kernel, run="half llama")))
    assert "with sdpa_kernel(kernels, set_priority=True):\n    for epoch in range(epochs):" in loop
    first = training_loop(plan_with(had("allocator: expandable segments")))
    assert first.index("PYTORCH_CUDA_ALLOC_CONF") < first.index("import torch\n")


def test_sharding_levers_take_the_place_of_the_loops_own_wrapper() -> None:
    setup = setup_of(RUNS["transformer"]()).having(world_size=2)
    for label, option in options_of(setup).items():
        if option.lever != "sharding":
            continue
        levers = option.applied_to(setup).workload.levers
        plan = ragged_plan(8, ((2, 2), (2, 2)), autocast=None)
        sharding: Any = "fsdp" if "FSDP2" in label else "ddp"
        loop = training_loop(dataclasses.replace(plan, levers=levers, sharding=sharding))
        compile(loop, "loop", "exec")
        assert loop.count("DistributedDataParallel(model") == ("FSDP2" not in label)
        assert ("fully_shard(model" in loop) == ("FSDP2" in label)


def test_code_that_is_no_python_is_told_as_comments() -> None:
    odd = AppliedLever(lever="mine", value="on", code="use the fast mode\n# of the library")
    code = lever_code([odd])
    assert code.model == "# mine: on\n# use the fast mode\n# of the library"
    compile(training_loop(plan_with((odd,))), "loop", "exec")


def test_autocast_is_the_plans_own_and_not_said_twice() -> None:
    levers = had("precision: bf16 autocast")
    loop = training_loop(plan_with(levers, autocast="bf16"))
    assert loop.count("torch.autocast") == 1


def test_what_is_run_in_the_backward_pass_is_not_stepped_again() -> None:
    loop = training_loop(plan_with(had("optimizer: in backward")))
    assert loop.count("optimizer.step()") == 1  # in the comment of the lever
