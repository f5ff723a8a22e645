"""Optimizers of all kinds: several, wrapped, without hooks, with closures, in hooks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autobatch
from autobatch.devices.base import Run
from autobatch.devices.virtual.gpu import VirtualGpu
from autobatch.errors import UsageError, WorkloadError
from autobatch.gpus.catalogue import find_gpu
from autobatch.memory.accounting import footprint_of
from autobatch.records.footprint import Footprint
from autobatch.workload.workload import Workload
from tests.support.seen import Seen

WIDTH = 512
LAYER = 4 * WIDTH * WIDTH

AdamW, SGD = torch.optim.AdamW, torch.optim.SGD


def two_layers() -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2)))


def ran(model: nn.Module, steps: int = 1, **options: Any) -> tuple[Run, Footprint]:
    if "window" not in options:
        options.setdefault("loss", lambda model, x: model(x).square().mean())
    workload = Workload(model=model, batch=lambda n: torch.ones(n, WIDTH), **options)
    device = VirtualGpu(find_gpu("t4"))
    run = device.run(workload, micro_batch=2, accumulation_steps=steps)
    return run, footprint_of(run.trace, run.replay, device.spec, device.evidence, simulated=True)


def state_bytes(model: nn.Module, **options: Any) -> int:
    return ran(model, **options)[1].optimizer_bytes


class Momentum:
    """Steps over parameters without being a `torch.optim.Optimizer`, with its state in a list."""

    def __init__(self, parameters: Any) -> None:
        self.param_groups = [{"params": list(parameters)}]
        self.sums: list[Tensor] | None = None

    def step(self) -> None:
        parameters = self.param_groups[0]["params"]
        if self.sums is None:
            self.sums = [torch.zeros_like(p) for p in parameters]
        for parameter, total in zip(parameters, self.sums, strict=True):
            total.add_(parameter.grad)
            parameter.data.sub_(total)

    def zero_grad(self) -> None:
        for parameter in self.param_groups[0]["params"]:
            parameter.grad = None


class Averaged:
    """Wraps another optimizer, and averages the parameters."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.slow = [[p.detach().clone() for p in g["params"]] for g in inner.param_groups]

    @property
    def param_groups(self) -> Any:
        return self.inner.param_groups

    @property
    def state(self) -> Any:
        return self.inner.state

    def zero_grad(self) -> None:
        self.inner.zero_grad()

    def step(self) -> None:
        self.inner.step()
        for group, slow in zip(self.param_groups, self.slow, strict=True):
            for parameter, average in zip(group["params"], slow, strict=True):
                average.add_(parameter.detach() - average, alpha=0.5)


class Sharpened(SGD):
    """Asks for a closure although its step can be called without one, as SAM does."""

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        if closure is None:
            raise RuntimeError("Sharpened requires closure, but it was not provided")
        with torch.enable_grad():
            closure()
        return super().step()


def test_all_optimizers_of_a_list_step_and_all_of_their_state_counts() -> None:
    model = two_layers()
    pair = [AdamW(model[0].parameters()), SGD(model[1].parameters(), momentum=0.9)]
    run, footprint = ran(model, optimizer=pair)
    assert footprint.optimizer_bytes == 3 * LAYER
    assert run.optimizer == "AdamW and SGD"
    assert run.notes == ()


@pytest.mark.parametrize(
    ("given", "layers"),
    [
        (lambda m: {"a": AdamW(m[0].parameters()), "b": AdamW(m[1].parameters())}, 4),
        (lambda m: (lambda ps: [AdamW(ps[:1]), torch.optim.Muon(ps[1:])]), 3),
        (lambda m: [lambda ps: AdamW(ps[:1]), lambda ps: SGD(ps[1:])], 2),
        (lambda m: (lambda model: AdamW(model[0].parameters())), 2),
        (lambda m: (lambda named_params: AdamW([dict(named_params)["1.weight"]])), 2),
        (lambda m: Momentum, 2),
        (lambda m: Momentum(m.parameters()), 2),
        (lambda m: Averaged(AdamW(m.parameters())), 6),
        (lambda m: (lambda ps: Averaged(SGD(ps))), 2),
    ],
)  # fmt: skip
def test_what_an_optimizer_keeps_is_its_state_however_it_is_given(given: Any, layers: int) -> None:
    model = two_layers()
    run, footprint = ran(model, optimizer=given(model))
    assert footprint.optimizer_bytes == layers * LAYER
    assert not [note for note in run.notes if "on the CPU" in note or "never made" in note]


def test_a_list_of_names_and_the_dict_of_a_window_reach_the_run() -> None:
    names = Seen()

    def window(model: nn.Module, optimizers: Any, batches: Any) -> None:
        names.append(sorted(optimizers))
        for x in batches:
            for name, part in (("first", model[0]), ("second", model[1])):
                part(x).mean().backward()
                optimizers[name].step()
                optimizers[name].zero_grad()

    model = two_layers()
    pair = {"first": AdamW(model[0].parameters()), "second": AdamW(model[1].parameters())}
    run, footprint = ran(model, window=window, optimizer=pair)
    assert names == [["first", "second"]] * 2
    assert footprint.optimizer_bytes == 4 * LAYER
    assert not [p for p in model.parameters() if p.grad is not None or pair["first"].state]
    plan = autobatch.tune(
        model, target=4, sample=torch.ones(1, WIDTH), loss=lambda m, x: m(x).mean(), gpu="t4",
        optimizer=["adamw", "sgd"],
    )  # fmt: skip
    assert plan.model.optimizer == "AdamW and SGD"


def test_activations_between_two_steps_of_a_window_are_activations() -> None:
    def window(model: nn.Module, optimizers: Any, batches: Any) -> None:
        for x in batches:
            for part, optimizer in zip(model, optimizers, strict=True):
                part(x.repeat(1024, 1)).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()

    model = two_layers()
    run, _ = ran(model, window=window, optimizer=[SGD(part.parameters()) for part in model])
    made = [block for block in run.trace.blocks if block.size_bytes == 2 * 1024 * WIDTH * 4]
    kept = [block for block in made if block.phase in ("forward", "step")]
    products = [block for block in kept if block.op == "aten::mm"]
    assert len(products) == 4
    assert {block.category for block in products} == {"activations"}


@pytest.mark.parametrize("given", ["", [], {}, [3], {"a": None}])
def test_what_is_no_optimizer_is_refused_in_one_line(given: Any) -> None:
    with pytest.raises(UsageError) as caught:
        autobatch.tune(two_layers(), target=2, sample=torch.ones(1, WIDTH), optimizer=given)
    assert len(str(caught.value)) < 300


def test_optimizers_that_hold_nothing_of_the_model_are_refused() -> None:
    others = [AdamW(two_layers().parameters()), SGD(two_layers().parameters())]
    with pytest.raises(WorkloadError, match="AdamW and SGD holds none of the model's"):
        ran(two_layers(), optimizer=others)
    with pytest.raises(WorkloadError, match="returned a int"):
        ran(two_layers(), optimizer=lambda parameters: 3)


def test_lbfgs_evaluates_in_its_step_and_has_its_whole_history() -> None:
    counted = Seen()

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        counted.append(x.shape)
        return model(x).square().mean()

    run, footprint = ran(
        two_layers(), steps=2, loss=loss,
        optimizer=lambda ps: torch.optim.LBFGS(ps, history_size=4, max_iter=3),
    )  # fmt: skip
    assert len(counted) >= 4 and set(counted) == {(2, WIDTH)}
    vectors = footprint.optimizer_bytes / (2 * LAYER)
    assert 10 <= vectors < 12  # 4 pairs, a direction, the last gradient, and a new pair
    assert footprint.gradients_bytes == 2 * LAYER
    assert run.notes == ()


def test_an_optimizer_that_asks_for_a_closure_in_its_step_gets_one() -> None:
    run, footprint = ran(two_layers(), optimizer=lambda ps: Sharpened(ps, momentum=0.9))
    assert footprint.optimizer_bytes == 2 * LAYER
    assert run.notes == ()


def test_what_a_closure_allocates_is_no_state() -> None:
    def window(model: nn.Module, optimizer: Any, batches: Any) -> None:
        for x in batches:

            def closure(x: Tensor = x) -> Tensor:
                optimizer.zero_grad()
                kept.append(model(x).detach())
                loss = kept[-1].new_zeros(()) + model(x).square().mean()
                loss.backward()
                return loss

            optimizer.step(closure)

    kept: list[Tensor] = []
    assert state_bytes(two_layers(), window=window, optimizer=SGD) == 0


def test_state_of_optimizers_in_hooks_counts_and_they_count_as_stepping() -> None:
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4)))
    parts = {p: AdamW([p], foreach=False) for p in model.parameters()}

    def update(parameter: Tensor) -> None:
        parts[parameter].step()
        parts[parameter].zero_grad()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(update)

    def window(model: nn.Module, optimizer: Any, batches: Any) -> None:
        for x in batches:
            model(x).square().mean().backward()

    run, footprint = ran(model, window=window, optimizer=lambda ps: SGD(ps, lr=0))
    assert footprint.optimizer_bytes == 8 * LAYER
    assert footprint.gradients_bytes <= LAYER
    assert run.notes == ()
    assert not any(part.state for part in parts.values())


def test_optimizers_that_a_window_makes_count() -> None:
    def window(model: nn.Module, optimizer: Any, batches: Any) -> None:
        if "made" not in own:
            own["made"] = AdamW(model[1].parameters())
        for x in batches:
            model(x).mean().backward()
        for one in (optimizer, own["made"]):
            one.step()
            one.zero_grad()

    own: dict[str, Any] = {}
    model = two_layers()
    given = AdamW(model[0].parameters())
    assert state_bytes(model, window=window, optimizer=given) == 4 * LAYER
    assert not own


def test_an_optimizer_that_never_steps_is_said_to() -> None:
    def window(model: nn.Module, optimizer: Any, batches: Any) -> None:
        for x in batches:
            model(x).mean().backward()
        first.step()
        first.zero_grad()

    model = two_layers()
    first, second = AdamW(model[0].parameters()), SGD(model[1].parameters())
    run, _ = ran(model, window=window, optimizer=[first, second])
    assert [note for note in run.notes if note.startswith("SGD never made a step; AdamW did")]


def test_averages_that_hooks_of_the_user_make_are_no_state() -> None:
    class Average:
        def __init__(self) -> None:
            self.held: list[Tensor] = []

        def __call__(self, optimizer: Any, args: Any, kwargs: Any) -> None:
            if not self.held:
                self.held = [p.detach().clone() for p in optimizer.param_groups[0]["params"]]

    model = two_layers()
    optimizer = SGD(model.parameters(), momentum=0.9)
    optimizer.register_step_post_hook(Average())
    run, footprint = ran(model, optimizer=optimizer)
    assert footprint.optimizer_bytes == 2 * LAYER
    made = [block for block in run.trace.blocks if block.op == "aten::clone"]
    is_state = sorted(block.category == "optimizer_state" for block in made)
    assert is_state == [False, False, True, True]  # the averages, and the momentum


def test_parameters_without_a_gradient_are_named() -> None:
    model = nn.ModuleDict({"used": nn.Linear(WIDTH, 1), "spare": nn.Linear(WIDTH, 1)})
    run, _ = ran(model, loss=lambda model, x: model["used"](x).mean(), optimizer=SGD)
    (note,) = run.notes
    assert note.startswith("2 parameters of the 4 that are trained never got a gradient, such as ")
    assert "spare.weight" in note


def test_the_modules_of_a_window_with_its_own_optimizers_are_trained_as_the_model_is() -> None:
    generator, critic = two_layers(), two_layers()
    first, second = AdamW(generator.parameters()), AdamW(critic.parameters())

    def window(model: nn.Module, optimizer: Any, batches: Any) -> None:
        for x in batches:
            critic(model(x).detach()).mean().backward()
            second.step()
            critic(model(x)).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            second.zero_grad()

    run, footprint = ran(generator, window=window, optimizer=first)
    assert footprint.parameters_bytes == 4 * LAYER
    assert footprint.gradients_bytes == 4 * LAYER
    assert footprint.optimizer_bytes == 8 * LAYER
    assert run.notes == ()


def test_the_closure_of_a_window_is_evaluated_in_the_step() -> None:
    def window(model: nn.Module, optimizer: Any, batches: Any) -> None:
        for x in batches:

            def closure(x: Tensor = x) -> Tensor:
                optimizer.zero_grad()
                loss = model(x).square().mean()
                loss.backward()
                return loss

            optimizer.step(closure)

    make = lambda ps: torch.optim.LBFGS(ps, history_size=4, max_iter=3)  # noqa: E731
    own = state_bytes(two_layers(), window=window, optimizer=make)
    assert own == state_bytes(two_layers(), optimizer=make)
