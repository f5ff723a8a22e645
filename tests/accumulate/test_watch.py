"""A window either has the gradient of its whole batch, or raises: what else touches gradients."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from autobatch import (
    AutobatchError,
    AutobatchWarning,
    UsageError,
    Window,
    Windows,
    WorkloadError,
    windows,
)

STEPS, SAMPLES = 4, 24


class Branches(nn.Module):
    """A network of which some micro-batches reach only one branch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.left, self.right = (nn.Linear(5, 5).double() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        branch = self.left if float(x[0, 0]) > 0 else self.right
        return branch(torch.tanh(self.first(x)))


def network(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "branches":
        return Branches()
    if kind == "frozen":
        model = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 2)).double()
        model[0].requires_grad_(False)
        return model
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 2)).double()


def data(samples: int = SAMPLES) -> Tensor:
    return torch.randn(samples, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    return sum(model(row[None]).square().mean() for row in batch) / len(batch)  # type: ignore[return-value]


def by_hand(model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[Tensor]) -> None:
    for batch in batches:
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()


def apart(left: nn.Module, right: nn.Module) -> float:
    pairs = zip(left.parameters(), right.parameters(), strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


def windows_of(model: nn.Module, optimizer: Any, steps: int = STEPS, **options: Any) -> Windows:
    return windows(data().split(2), optimizer, micro_batch=2, accumulation_steps=steps, **options)


# -- what a user may leave in a loop, at any place of it

Action = Callable[[nn.Module, torch.optim.Optimizer, Window, Tensor], Any]


def _first_gradient_dropped(model: nn.Module, *_: Any) -> None:
    list(model.parameters())[-1].grad = None


def _zeroed_one(model: nn.Module, *_: Any) -> None:
    gradient = list(model.parameters())[-1].grad
    if gradient is not None:
        gradient.zero_()


ACTIONS: dict[str, Action] = {
    "optimizer.zero_grad()": lambda model, optimizer, *_: optimizer.zero_grad(),
    "zero_grad(set_to_none=False)": lambda m, o, *_: o.zero_grad(set_to_none=False),
    "model.zero_grad()": lambda model, *_: model.zero_grad(),
    "optimizer.step()": lambda model, optimizer, *_: optimizer.step(),
    "a backward of its own": lambda model, o, w, batch: loss_of(model, batch).backward(),
    "clipping": lambda model, *_: nn.utils.clip_grad_norm_(model.parameters(), 0.01),
    "one gradient dropped": _first_gradient_dropped,
    "one gradient zeroed": _zeroed_one,
    "window.step()": lambda model, optimizer, window, batch: window.step(),
    "window.skip()": lambda model, optimizer, window, batch: window.skip(),
    "an evaluation": lambda model, o, w, batch: model.eval()(batch).sum().item(),
    "autograd.grad": lambda model, o, w, batch: torch.autograd.grad(
        loss_of(model, batch), [p for p in model.parameters() if p.requires_grad], allow_unused=True
    ),
    "another window": lambda model, optimizer, window, batch: [
        (w.run(lambda b: loss_of(model, b)), w.step()) for w in windows_of(model, optimizer)
    ],
}
PLACES = ("before the forward", "before the backward", "after the backward")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::autobatch.AutobatchWarning")
@settings(max_examples=300, deadline=None)
@given(
    kind=st.sampled_from(["plain", "branches", "frozen"]),
    optimizer=st.sampled_from(["sgd", "momentum", "adamw"]),
    left_over=st.lists(
        st.tuples(
            st.sampled_from(sorted(ACTIONS)),
            st.integers(0, SAMPLES // 2 - 1),
            st.sampled_from(PLACES),
        ),
        max_size=2,
    ),
    steps=st.sampled_from([1, 2, 4]),
    function=st.booleans(),
)
def test_a_loop_has_the_update_of_the_whole_batch_or_raises(
    kind: str,
    optimizer: str,
    left_over: list[tuple[str, int, str]],
    steps: int,
    function: bool,
) -> None:
    """Whatever is left in the loop, at whatever micro-batch and place."""
    model, reference = network(kind), network(kind)
    ours, theirs = _optimizer(optimizer, model), _optimizer(optimizer, reference)
    at, skipped = [0], []

    def act(place: str, window: Window, batch: Tensor) -> None:
        for name, where, when in left_over:
            if (where, when) == (at[0], place):
                ACTIONS[name](model.train(), ours, window, batch)
                if name == "window.skip()":
                    skipped.append(where)

    def run(window: Window) -> None:
        for batch in window:
            act(PLACES[0], window, batch)
            loss = loss_of(model.train(), batch)
            act(PLACES[1], window, batch)
            if at[0] not in skipped:
                window.backward(loss)
            act(PLACES[2], window, batch)
            at[0] += 1

    def compute(window: Window, batch: Tensor) -> Tensor | None:
        act(PLACES[0], window, batch)
        loss = loss_of(model.train(), batch)
        act(PLACES[1], window, batch)
        at[0] += 1
        return loss if at[0] - 1 not in skipped else None

    try:
        for window in windows_of(model, ours, steps):
            if function:
                window.run(lambda batch, window=window: compute(window, batch))
            else:
                run(window)
            window.step()
    except AutobatchError:
        assert left_over
        return
    pieces = data().split(2)
    rest = [
        [piece for i, piece in enumerate(pieces) if i // steps == w and i not in skipped]
        for w in range(len(pieces) // steps)
    ]
    by_hand(reference, theirs, [torch.cat(part) for part in rest if part])
    assert apart(model, reference) < 1e-12


def _optimizer(name: str, model: nn.Module) -> torch.optim.Optimizer:
    if name == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=0.01)
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9 * (name == "momentum"))


@pytest.mark.parametrize("name", sorted(set(ACTIONS) - {"an evaluation", "autograd.grad"}))
def test_what_is_left_in_a_loop_is_said(name: str) -> None:
    model = network("plain")
    optimizer = _optimizer("sgd", model)

    def loop() -> None:
        for window in windows_of(model, optimizer):
            for batch in window:
                window.backward(loss_of(model, batch))
                ACTIONS[name](model, optimizer, window, batch)
            window.step()

    with pytest.raises(WorkloadError):
        loop()


# -- between windows


def test_gradients_of_anything_else_do_not_enter_the_next_window() -> None:
    model, reference = network("plain"), network("plain")
    optimizer = _optimizer("sgd", model)
    for window in windows_of(model, optimizer):
        window.run(lambda batch: loss_of(model, batch))
        window.step()
        model(data()).mean().backward()
    by_hand(reference, _optimizer("sgd", reference), list(data().split(8)))
    assert apart(model, reference) < 1e-12


def test_the_windows_of_two_models_that_reach_each_other_take_turns() -> None:
    """A GAN: the generator's backward pass also fills the discriminator's gradients."""
    pairs = [(network("plain"), nn.Linear(2, 1).double()) for _ in range(2)]
    pairs[1][1].load_state_dict(pairs[0][1].state_dict())
    optimizers = [[_optimizer("sgd", part) for part in pair] for pair in pairs]

    def loss(pair: tuple[nn.Module, nn.Module], which: int, batch: Tensor) -> Tensor:
        judged = pair[1](pair[0](batch) if which == 0 else pair[0](batch).detach())
        return judged.square().mean() * (1 - 2 * which)

    both = [windows_of(pairs[0][0], optimizers[0][which]) for which in (0, 1)]
    for turns in zip(*both, strict=True):
        for which, window in enumerate(turns):
            for batch in window:
                window.backward(loss(pairs[0], which, batch))
            window.step()
    for batch in data().split(8):
        for which in (0, 1):
            optimizers[1][which].zero_grad()
            loss(pairs[1], which, batch).backward()
            optimizers[1][which].step()
    assert max(apart(*parts) for parts in zip(*pairs, strict=True)) < 1e-12


def test_a_part_of_many_parameters_that_another_model_reaches_does_not_enter() -> None:
    """A GAN whose generator matches features of one layer of a discriminator of many."""
    layers = 40

    def made() -> tuple[nn.ModuleList, nn.Module]:
        torch.manual_seed(0)
        return nn.ModuleList(nn.Linear(5, 5) for _ in range(layers)).double(), network("plain")

    def judged(deep: nn.ModuleList, generator: nn.Module, batch: Tensor) -> Tensor:
        made = generator(batch).detach().sum(1, keepdim=True) + batch
        for layer in deep:
            made = made + torch.tanh(layer(made)) / layers
        return made.square().mean()

    def matched(deep: nn.ModuleList, generator: nn.Module, batch: Tensor) -> Tensor:
        return deep[3](generator(batch).sum(1, keepdim=True) + batch).square().mean()

    pairs = [made(), made()]
    optimizers = [[_optimizer("sgd", part) for part in pair] for pair in pairs]
    both = [windows_of(pairs[0][0], one, steps=2) for one in optimizers[0]]
    for turns in zip(*both, strict=True):
        for loss, window in zip((judged, matched), turns, strict=True):
            for batch in window:
                window.backward(loss(*pairs[0], batch))
            window.step()
    for batch in data().split(4):
        for loss, optimizer in zip((judged, matched), optimizers[1], strict=True):
            optimizer.zero_grad()
            loss(*pairs[1], batch).backward()
            optimizer.step()
    assert max(apart(*parts) for parts in zip(*pairs, strict=True)) < 1e-12


def test_what_few_of_many_parameters_are_given_in_a_later_window_is_refused() -> None:
    model = nn.Sequential(*(nn.Linear(5, 5) for _ in range(40))).double()

    def loop() -> None:
        for number, window in enumerate(windows_of(model, _optimizer("sgd", model))):
            for at, batch in enumerate(window):
                window.backward(loss_of(model, batch))
                if number == 1 and at == 1:
                    model[7].bias.grad.mul_(2)
            assert not number
            window.step()

    with pytest.raises(WorkloadError, match="gradients of the window were changed"):
        loop()


@pytest.mark.parametrize("name", ["sgd", "momentum", "adamw"])
def test_parameters_that_are_replaced_in_their_groups_have_no_gradients_left(name: str) -> None:
    """Splats and surgery on networks write other parameters into the optimizer's own lists."""
    model, reference = network("plain"), network("plain")
    optimizer, other = _optimizer(name, model), _optimizer(name, reference)

    def replaced(of: nn.Module, by: torch.optim.Optimizer) -> None:
        old = of[0].weight
        by.state.pop(old, None)
        of[0].weight = nn.Parameter(old.detach() / 2)
        by.param_groups[0]["params"][0] = of[0].weight

    for number, window in enumerate(windows_of(model, optimizer)):
        window.run(lambda batch: loss_of(model, batch))
        window.step()
        assert all(parameter.grad is None for parameter in model.parameters())
        if not number:
            replaced(model, optimizer)
    for number, batch in enumerate(data().split(8)):
        by_hand(reference, other, [batch])
        if not number:
            replaced(reference, other)
    assert apart(model, reference) < 1e-12


@pytest.mark.parametrize("change", ["replaced", "added"])
def test_parameters_that_come_in_the_midst_of_a_window_are_refused(change: str) -> None:
    model = network("plain")
    optimizer = torch.optim.SGD([model[0].weight, model[0].bias], lr=0.1)

    def loop() -> None:
        for window in windows_of(model, optimizer):
            for at, batch in enumerate(window):
                if at == 2 and change == "added":
                    optimizer.add_param_group({"params": [*model[2].parameters()]})
                elif at == 2:
                    model[0].weight = nn.Parameter(model[0].weight.detach().clone())
                    optimizer.param_groups[0]["params"][0] = model[0].weight
                window.backward(loss_of(model, batch))

    with pytest.raises(WorkloadError, match="given other parameters while the window ran"):
        loop()


# -- what looks like trouble and is none


def test_a_sum_that_is_divided_by_as_many_samples_as_there_are_steps_is_a_mean() -> None:
    model, loader = network("plain"), data(16).split(4)
    optimizer = _optimizer("sgd", model)
    window = next(iter(windows(loader, optimizer, micro_batch=4, accumulation_steps=4)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        window.run(lambda batch: model(batch).square().mean(1).sum() / len(batch))


def test_an_embedding_that_renormalises_itself_is_no_foreign_update() -> None:
    tables = [nn.Embedding(9, 4, max_norm=0.5).double() for _ in range(2)]
    tables[1].load_state_dict(tables[0].state_dict())
    rows = torch.arange(24) % 9
    optimizer, other = (torch.optim.SGD(table.parameters(), lr=0.1) for table in tables)
    for window in windows(rows.split(2), optimizer, micro_batch=2, accumulation_steps=4):
        for batch in window:
            window.backward(tables[0](batch).square().mean())
        window.step()
    for batch in rows.split(8):
        other.zero_grad()
        tables[1](batch).square().mean().backward()
        other.step()
    assert apart(*tables) < 1e-12


def test_sparse_gradients_and_those_that_turn_dense_are_added_up() -> None:
    tables = [nn.Embedding(9, 4, sparse=True).double() for _ in range(2)]
    tables[1].load_state_dict(tables[0].state_dict())
    rows = torch.arange(24) % 9

    def loss(table: nn.Embedding, batch: Tensor) -> Tensor:
        dense = table.weight.square().sum() if 5 in batch else 0
        return table(batch).square().mean() + dense

    optimizer = torch.optim.SGD(tables[0].parameters(), lr=0.1)
    for window in windows(rows.split(2), optimizer, micro_batch=2, accumulation_steps=4):
        for batch in window:
            window.backward(loss(tables[0], batch))
        window.step()
    for batch in rows.split(8):
        total = sum(loss(tables[1], part) for part in batch.split(2)) / 4
        tables[1].weight.grad = None
        total.backward()
        with torch.no_grad():
            tables[1].weight -= 0.1 * tables[1].weight.grad.to_dense()
    assert apart(*tables) < 1e-12


def test_hooks_that_take_gradients_away_are_refused() -> None:
    """As optimizers in backward hooks do that write through `.data`."""
    model = network("plain")

    def own_update(parameter: Tensor) -> None:
        parameter.data -= 0.1 * parameter.grad
        parameter.grad = None

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(own_update)
    window = next(iter(windows_of(model, _optimizer("sgd", model))))
    with pytest.raises(WorkloadError, match="hook"):
        window.run(lambda batch: loss_of(model, batch))


def test_a_loss_of_another_model_is_said() -> None:
    model, other = network("plain"), network("plain")
    window = next(iter(windows_of(model, _optimizer("sgd", model))))
    with pytest.warns(AutobatchWarning, match="no parameter of the optimizers has a gradient"):
        window.run(lambda batch: loss_of(other, batch))


def test_parameters_that_are_unfrozen_are_watched_from_then_on() -> None:
    model = network("frozen")

    def loop() -> None:
        for number, window in enumerate(windows_of(model, _optimizer("sgd", model))):
            model[0].requires_grad_(number > 0)
            for at, batch in enumerate(window):
                window.backward(loss_of(model, batch))
                if number and at == 1:
                    model[0].weight.grad.zero_()
            assert not number
            window.step()

    with pytest.raises(WorkloadError, match="gradients of the window were changed"):
        loop()


def test_hooks_of_the_optimizer_are_gone_when_the_windows_end() -> None:
    model = network("plain")
    optimizer = _optimizer("sgd", model)
    for left_by_break in (False, True):
        for window in windows_of(model, optimizer):
            window.run(lambda batch: loss_of(model, batch))
            window.step()
            if left_by_break:
                break
        assert not optimizer._optimizer_step_pre_hooks
        optimizer.step()


# -- a second look at the same micro-batches


def test_sharpness_aware_steps_look_twice() -> None:
    model, reference = network("plain"), network("plain")
    optimizer, other = _optimizer("sgd", model), _optimizer("sgd", reference)

    def climb(net: nn.Module, sign: int, steps: list[Tensor]) -> None:
        with torch.no_grad():
            for p, step in zip(net.parameters(), steps, strict=True):
                p.add_(step, alpha=sign)

    for window in windows_of(model, optimizer):
        for batch in window:
            window.backward(loss_of(model, batch))
        steps = [0.05 * p.grad for p in model.parameters()]
        climb(model, 1, steps)
        window.again()
        for batch in window:
            window.backward(loss_of(model, batch))
        climb(model, -1, steps)
        window.step()
    for batch in data().split(8):
        loss_of(reference, batch).backward()
        steps = [0.05 * p.grad for p in reference.parameters()]
        climb(reference, 1, steps)
        other.zero_grad()
        loss_of(reference, batch).backward()
        climb(reference, -1, steps)
        other.step()
        other.zero_grad()
    assert apart(model, reference) < 1e-12


@pytest.mark.parametrize("function", [False, True])
def test_a_second_pass_without_again_is_refused(function: bool) -> None:
    model = network("plain")
    window = next(iter(windows_of(model, _optimizer("sgd", model))))
    window.run(lambda batch: loss_of(model, batch))
    with pytest.raises(WorkloadError, match=r"window\.again\(\) gives them once more"):
        window.run(lambda batch: loss_of(model, batch)) if function else list(window)


def test_batches_that_were_written_to_are_not_given_again() -> None:
    model = network("plain")
    window = next(iter(windows_of(model, _optimizer("sgd", model))))
    window.run(lambda batch: loss_of(model, batch.mul_(2)))
    with pytest.raises(WorkloadError, match="written to in place"):
        window.again()


def test_what_a_loop_takes_out_of_a_batch_is_there_again() -> None:
    model = network("plain")
    loader = [{"x": part, "names": ["a", "b"]} for part in data().split(2)]
    window = next(
        iter(windows(loader, _optimizer("sgd", model), micro_batch=2, accumulation_steps=4))
    )
    for _ in range(2):
        for batch in window:
            assert batch.pop("names") == ["a", "b"]
            window.backward(loss_of(model, batch["x"]))
        window.again()


# -- odd but legal loops


def test_several_losses_of_one_graph() -> None:
    model, reference = network("plain"), network("plain")
    optimizer = _optimizer("sgd", model)
    for window in windows_of(model, optimizer):
        for batch in window:
            output = model(batch)
            window.backward(output.square().mean(), retain_graph=True)
            window.backward(output.abs().mean())
        window.step()
    other = _optimizer("sgd", reference)
    for batch in data().split(8):
        other.zero_grad()
        output = reference(batch)
        (output.square().mean() + output.abs().mean()).backward()
        other.step()
    assert apart(model, reference) < 1e-12


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("function", [False, True])
def test_a_skipped_micro_batch_has_no_part_in_the_window(weighted: bool, function: bool) -> None:
    model, reference = network("plain"), network("plain")
    x = data()
    x[4:6] = torch.nan
    weight = (lambda batch: float(batch.shape[0] * 3)) if weighted else None
    run = windows(
        x.split(2), _optimizer("sgd", model), micro_batch=2, accumulation_steps=4, weight=weight
    )

    def loss(batch: Tensor, window: Window) -> Tensor | None:
        if batch.isnan().any():
            return window.skip()
        return loss_of(model, batch)

    samples, losses = [], []
    for window in run:
        if function:
            window.run(lambda batch, window=window: loss(batch, window))
        else:
            for batch in window:
                value = loss(batch, window)
                if value is not None:
                    window.backward(value)
        window.step()
        samples.append(window.samples)
        losses.append(float(window.loss))
    parts = [torch.cat([x[:4], x[6:8]]), x[8:16], x[16:]]
    other = _optimizer("sgd", reference)
    expected = []
    for part in parts:
        expected.append(float(loss_of(reference, part).detach()))
        by_hand(reference, other, [part])
    assert samples == [6, 8, 8]
    assert losses == pytest.approx(expected, rel=1e-12)
    assert apart(model, reference) < 1e-12


def test_a_window_whose_micro_batches_are_all_skipped_has_no_update() -> None:
    model = network("plain")
    before = copy.deepcopy(model)
    optimizer = _optimizer("adamw", model)
    for window in windows_of(model, optimizer):
        for _ in window:
            window.skip()
        with pytest.warns(AutobatchWarning, match="has no update"):
            window.step()
        assert window.skipped
    assert apart(model, before) == 0 and not optimizer.state


def test_a_window_is_left_after_a_break() -> None:
    model, reference = network("plain"), network("plain")
    optimizer = _optimizer("sgd", model)
    for number, window in enumerate(windows_of(model, optimizer)):
        for batch in window:
            window.backward(loss_of(model, batch))
            if number == 1:
                break
        if number == 1:
            with pytest.raises(WorkloadError, match=r"window\.skip\(\) leaves the window"):
                window.step()
            window.skip()
            continue
        window.step()
    parts = data().split(8)
    by_hand(reference, _optimizer("sgd", reference), [parts[0], parts[2]])
    assert apart(model, reference) < 1e-12


def test_after_a_window_that_failed_the_next_one_can_run() -> None:
    model, reference = network("plain"), network("plain")

    def loss(batch: Tensor) -> Tensor:
        raise KeyError("a bad sample")

    for number, window in enumerate(windows_of(model, _optimizer("sgd", model))):
        if number == 1:
            with pytest.raises(KeyError):
                window.run(loss)
            window.skip()
            continue
        window.run(lambda batch: loss_of(model, batch))
        window.step()
    parts = data().split(8)
    by_hand(reference, _optimizer("sgd", reference), [parts[0], parts[2]])
    assert apart(model, reference) < 1e-12


def test_batches_of_which_a_collate_function_left_nothing_are_passed_over() -> None:
    model, reference = network("plain"), network("plain")
    parts: list[Any] = list(data().split(2))
    loader = [None, *parts[:3], data(0), [], *parts[3:], {"x": data(0)}]
    run = windows(loader, _optimizer("sgd", model), micro_batch=2, accumulation_steps=4)
    for window in run:
        window.run(lambda batch: loss_of(model, batch))
        window.step()
        assert window.samples == 8
    by_hand(reference, _optimizer("sgd", reference), list(data().split(8)))
    assert apart(model, reference) < 1e-12


def test_a_backward_pass_of_the_users_own_is_given_the_share() -> None:
    model, reference = network("plain"), network("plain")
    seen = []

    def backward(loss: Tensor, **options: Any) -> None:
        seen.append(options)
        loss.backward(**options)

    for window in windows_of(model, _optimizer("sgd", model), backward=backward):
        for batch in window:
            window.backward(loss_of(model, batch))
        window.step()
    by_hand(reference, _optimizer("sgd", reference), list(data().split(8)))
    assert apart(model, reference) < 1e-12 and seen == [{}] * 13  # the first one is a trial


def test_what_is_left_of_an_epoch_is_counted_when_training_resumes() -> None:
    model = network("plain")
    loader = torch.utils.data.DataLoader(data(), batch_size=2)  # type: ignore[arg-type]
    optimizer = _optimizer("sgd", model)
    run = windows(loader, optimizer, micro_batch=2, accumulation_steps=4)
    for window in run:
        window.run(lambda batch: loss_of(model, batch))
        window.step()
        break
    resumed = windows(loader, optimizer, micro_batch=2, accumulation_steps=4)
    assert len(resumed) == 3
    resumed.load_state_dict(run.state_dict())
    assert len(resumed) == len(list(_stepped(resumed, model))) == 2


def _stepped(run: Windows, model: nn.Module) -> Any:
    for window in run:
        window.run(lambda batch: loss_of(model, batch))
        window.step()
        yield window


# -- found by an attack on these


def _step_by_hand(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.data.add_(parameter.grad, alpha=-0.1)


@pytest.mark.parametrize(
    "left_over",
    [
        lambda model: [p.grad.data.zero_() for p in model.parameters() if p.grad is not None],
        _step_by_hand,
    ],
)
def test_what_is_written_through_data_in_every_micro_batch_is_said(left_over: Any) -> None:
    """Versions do not count it: in the first window, values are looked at."""
    model = network("plain")

    def loop() -> None:
        for window in windows_of(model, _optimizer("sgd", model)):
            for batch in window:
                left_over(model)
                window.backward(loss_of(model, batch))
            window.step()

    with pytest.raises(WorkloadError):
        loop()


class _Half(torch.autograd.Function):
    """Lets a backward pass fail after it has added to some gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise ValueError("half of it")


@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("then", ["skip", "again", "leave"])
def test_after_half_a_backward_pass_the_window_can_only_be_left(at: int, then: str) -> None:
    model, reference = network("plain"), network("plain")

    def loop() -> None:
        for number, window in enumerate(windows_of(model, _optimizer("sgd", model))):
            for index, batch in enumerate(window):
                if (number, index) == (1, at):
                    hidden = _Half.apply(model[0](batch))
                    with pytest.raises(ValueError, match="half of it"):
                        window.backward(model[2](torch.tanh(hidden)).square().mean())
                    if then == "leave":
                        break
                    if then == "skip":
                        window.skip()
                        continue
                window.backward(loss_of(model, batch))
            if number == 1 and then == "leave":
                window.skip()
            else:
                window.step()

    if then != "leave":
        with pytest.raises(WorkloadError, match="failed halfway"):
            loop()
        return
    loop()
    parts = data().split(8)
    by_hand(reference, _optimizer("sgd", reference), [parts[0], parts[2]])
    assert apart(model, reference) < 1e-12


def test_a_branch_that_is_reached_late_in_a_later_window_is_no_alarm() -> None:
    model, reference = Branches(), Branches()
    x = data()
    x[:, 0] = x[:, 0].abs()
    x[1::2, 0] *= -1  # both branches in each micro-batch
    x[8:12, 0] = x[8:12, 0].abs()  # one alone in the first two of the second window
    run = windows(x.split(2), _optimizer("sgd", model), micro_batch=2, accumulation_steps=4)
    for window in run:
        window.run(lambda batch: loss_of(model, batch))
        window.step()
    by_hand(reference, _optimizer("sgd", reference), list(x.split(8)))
    assert apart(model, reference) < 1e-12


def test_what_is_skipped_is_weighted_before_the_user_sees_gradients() -> None:
    model = network("plain")
    window = next(iter(windows_of(model, _optimizer("sgd", model))))
    kept = []
    for at, batch in enumerate(window):
        if at == 1:
            window.skip()
            continue
        kept.append(batch)
        window.backward(loss_of(model, batch))
    seen = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    loss_of(model, torch.cat(kept)).backward()
    for ours, p in zip(seen, model.parameters(), strict=True):
        torch.testing.assert_close(ours, p.grad, rtol=1e-12, atol=1e-12)


def test_a_hook_of_the_loss_that_writes_to_its_gradient_changes_that_pass_alone() -> None:
    model, reference = network("plain"), network("plain")

    def doubled(net: nn.Module, batch: Tensor) -> Tensor:
        loss = loss_of(net, batch)
        loss.register_hook(lambda gradient: gradient.mul_(2))
        return loss

    for window in windows_of(model, _optimizer("sgd", model)):
        window.run(lambda batch: doubled(model, batch))
        window.step()
    other = _optimizer("sgd", reference)
    for batch in data().split(8):
        other.zero_grad()
        doubled(reference, batch).backward()
        other.step()
    assert apart(model, reference) < 1e-12


def test_a_loss_that_was_scaled_before_is_refused() -> None:
    model = network("plain").float()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    optimizer = _optimizer("sgd", model)
    loader = data().float().split(2)
    window = next(
        iter(windows(loader, optimizer, micro_batch=2, accumulation_steps=2, scaler=scaler))
    )
    with pytest.raises(WorkloadError, match="multiplied by the scaler's scale"):
        window.run(lambda batch: scaler.scale(model(batch).square().mean()))


def test_a_loss_that_was_divided_by_the_steps_is_said() -> None:
    model = network("plain")
    window = next(iter(windows_of(model, _optimizer("sgd", model))))
    with pytest.warns(AutobatchWarning, match="divided by 4, the number of micro-batches"):
        window.run(lambda batch: loss_of(model, batch) / 4)


def test_a_loop_that_counts_its_micro_batches_is_whole() -> None:
    model, reference = network("plain"), network("plain")
    for window in windows_of(model, _optimizer("sgd", model)):
        for _, batch in zip(range(STEPS), window, strict=False):
            window.backward(loss_of(model, batch))
        window.step()
    by_hand(reference, _optimizer("sgd", reference), list(data().split(8)))
    assert apart(model, reference) < 1e-12


def test_a_function_that_runs_its_own_backward_is_refused() -> None:
    model = network("plain")
    window = next(iter(windows_of(model, _optimizer("sgd", model))))

    def loss(batch: Tensor) -> Tensor:
        value = loss_of(model, batch)
        window.backward(value)
        return value

    with pytest.raises(WorkloadError, match="let it return the loss"):
        window.run(loss)


def test_a_backward_that_divides_is_refused() -> None:
    """accelerator.backward with gradient_accumulation_steps=2."""
    model = network("plain")
    with pytest.raises(UsageError, match=r"multiplies gradients by 0\.5"):
        windows_of(model, _optimizer("sgd", model), backward=lambda loss: (loss / 2).backward())


def test_a_step_that_does_nothing_is_refused() -> None:
    """As that of a prepared optimizer inside of accelerate's `accumulate`."""

    class Idle(torch.optim.SGD):
        pass

    model = network("plain")
    optimizer = Idle(model.parameters(), lr=0.1)
    optimizer.step = lambda: None  # type: ignore[method-assign, misc, assignment]
    run = iter(windows_of(model, optimizer))
    window = next(run)
    window.run(lambda batch: loss_of(model, batch))
    with pytest.raises(WorkloadError, match="the step of Idle did nothing"):
        window.step()
