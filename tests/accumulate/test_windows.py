"""The training loop: gradients of accumulated windows are those of the effective batch."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from autobatch import (
    AutobatchWarning,
    Plan,
    SampleError,
    UsageError,
    Window,
    Windows,
    WorkloadError,
    check_equivalence,
    tune,
    windows,
)
from autobatch.records.split import split
from tests.support.plans import example_plan

TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5}


def mlp(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)


def plan_of(target: int, ceiling: int, world_size: int = 1) -> Plan:
    return example_plan(split=split(target, ceiling=ceiling, world_size=world_size))


def square(model: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: model(x).square().mean()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


class Watched(torch.optim.SGD):
    """Keeps the gradients that each of its steps saw."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model.parameters(), lr=0.1)
        self.seen: list[list[Tensor]] = []

    def step(self, closure: Any = None) -> Any:
        self.seen.append([p.grad.clone() for g in self.param_groups for p in g["params"]])
        return super().step(closure)


def differs(left: list[Tensor], right: list[Tensor]) -> float:
    """The largest difference, relative to the largest element of each tensor."""
    return max(
        float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))
        for a, b in zip(left, right, strict=True)
    )


def stepped(run: Windows, loss: Callable[[Any], Tensor]) -> Iterator[Window]:
    for window in run:
        for batch in window:
            window.backward(loss(batch))
        window.step()
        yield window


LOSSES = {
    "mse": nn.functional.mse_loss,
    "huber": nn.functional.huber_loss,
    "own": lambda output, wanted: (output - wanted).abs().pow(1.5).sum(-1).mean(),
}


@settings(max_examples=60, deadline=None)
@given(
    micro_batch=st.integers(1, 9),
    steps=st.integers(1, 5),
    loaded=st.integers(1, 40),
    samples=st.integers(1, 60),
    loss=st.sampled_from(sorted(LOSSES)),
    dtype=st.sampled_from(sorted(TOLERANCES, key=str)),
    reduction=st.sampled_from(["mean", "sum"]),
    seed=st.integers(0, 99),
)
@pytest.mark.filterwarnings("ignore::autobatch.AutobatchWarning")
def test_the_gradient_is_that_of_the_effective_batch(
    micro_batch: int,
    steps: int,
    loaded: int,
    samples: int,
    loss: str,
    dtype: torch.dtype,
    reduction: Any,
    seed: int,
) -> None:
    """Whatever the sizes of the loader's batches, the window and its last, partial one."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 5, dtype=dtype, generator=random)
    y = torch.randn(samples, 3, dtype=dtype, generator=random)
    loader = DataLoader(TensorDataset(x, y), batch_size=loaded)
    model, reference = mlp(dtype), mlp(dtype)
    optimizer, expected = Watched(model), Watched(reference)

    def loss_of(module: nn.Module, a: Tensor, b: Tensor) -> Tensor:
        return LOSSES[loss](module(a), b)

    size = micro_batch * steps
    for at in range(0, samples, size):
        whole = loss_of(reference, x[at : at + size], y[at : at + size])
        whole.backward()
        expected.step()
        expected.zero_grad()
    seen = []
    run = windows(
        loader, optimizer, micro_batch=micro_batch, accumulation_steps=steps, reduction=reduction
    )
    for window in run:
        for a, b in window:
            value = loss_of(model, a, b)
            window.backward(value * len(a) if reduction == "sum" else value)
        window.step()
        seen.append(window.samples)
    assert sum(seen) == samples and set(seen[:-1]) <= {size}
    assert max(window.micro_batches) <= micro_batch
    assert len(optimizer.seen) == len(expected.seen) == -(-samples // size)
    assert differs(optimizer.seen[0], expected.seen[0]) <= TOLERANCES[dtype]
    # later windows start from parameters that were rounded differently
    drift = 10 if dtype is torch.float32 else 100
    assert all(
        differs(a, b) <= drift * TOLERANCES[dtype]
        for a, b in zip(optimizer.seen, expected.seen, strict=True)
    )
    assert window.loss.item() == pytest.approx(whole.item(), rel=drift * TOLERANCES[dtype])


def tokens(batch: dict[str, Tensor]) -> Tensor:
    return (batch["labels"] != -100).sum()


def token_batches(counts: list[int], seed: int = 0) -> list[dict[str, Tensor]]:
    """One micro-batch of 2 samples for each count of labelled tokens."""
    random = torch.Generator().manual_seed(seed)
    batches = []
    for count in counts:
        x = torch.randn(2, 6, 5, dtype=torch.float64, generator=random)
        labels = torch.full((12,), -100)
        labels[torch.randperm(12, generator=random)[:count]] = 1
        batches.append({"x": x, "labels": labels.view(2, 6)})
    return batches


def token_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(
        model(batch["x"]).flatten(0, 1), batch["labels"].flatten(), ignore_index=-100
    )


@settings(max_examples=40, deadline=None)
@given(counts=st.lists(st.integers(0, 12), min_size=3, max_size=3).filter(any))
def test_a_mean_over_tokens_is_exact_with_their_weight(counts: list[int]) -> None:
    batches = token_batches(counts)
    whole = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
    model = mlp()
    token_loss(model, whole).backward()
    expected = gradients(model)
    optimizer = Watched(model)
    for window in windows(batches, optimizer, micro_batch=2, accumulation_steps=3, weight=tokens):
        for batch in window:
            window.backward(token_loss(model, batch))
        window.step()
    assert differs(optimizer.seen[0], expected) <= 1e-12
    assert window.weight == sum(counts)
    assert window.samples == 6


def test_a_window_without_any_weight_is_left_out_and_said() -> None:
    model = mlp()
    batches = token_batches([0, 0, 5, 0])
    optimizer = Watched(model)
    run = windows(batches, optimizer, micro_batch=2, accumulation_steps=2, weight=tokens)
    with pytest.warns(AutobatchWarning, match="window 0 has a weight of 0 over all its 4 samples"):
        list(stepped(run, lambda batch: token_loss(model, batch)))
    assert len(optimizer.seen) == 1
    assert all(tensor.isfinite().all() for tensor in optimizer.seen[0])


def test_a_loader_of_effective_batches_is_cut_into_the_windows_very_sizes() -> None:
    plan = plan_of(target=257, ceiling=100)
    data = TensorDataset(torch.randn(600, 5), torch.arange(600))
    model = mlp(torch.float32)
    run = plan.windows(DataLoader(data, batch_size=257), sgd(model))
    cut = []
    order = []
    for window in run:
        for x, index in window:
            order += index.tolist()
            window.backward(model(x).sum())
        window.step()
        cut.append(window.micro_batches)
    assert cut == [plan.split.windows[0], plan.split.windows[0], (86,)]
    assert order == list(range(600))
    assert len(run) == 3


def test_batches_that_do_not_divide_the_window_are_cut_and_that_is_said() -> None:
    data = torch.randn(20, 5, dtype=torch.float64)
    model = mlp()
    run = windows(DataLoader(data, batch_size=5), sgd(model), micro_batch=4, accumulation_steps=2)
    with pytest.warns(AutobatchWarning, match="or not a window of 8 samples: they are cut"):
        seen = [window.micro_batches for window in stepped(run, lambda x: model(x).mean())]
    assert seen == [(4, 1, 3), (2, 4, 1, 1), (4,)]


def test_detection_targets_are_cut_by_sample() -> None:
    targets = [{"boxes": torch.ones(n, 4), "labels": torch.ones(n)} for n in (3, 1, 2, 4)]
    batch = {"images": torch.randn(4, 5, dtype=torch.float64), "targets": targets}
    model = mlp()
    seen = []
    for window in windows([batch], sgd(model), micro_batch=3, accumulation_steps=2):
        for part in window:
            seen.append([len(target["boxes"]) for target in part["targets"]])
            window.backward(model(part["images"]).mean())
        window.step()
    assert seen == [[3, 1, 2], [4]]


def test_a_tensor_without_a_row_a_sample_is_never_cut_silently() -> None:
    batch = {"x": torch.randn(4, 5), "ids": torch.zeros(4), "patches": torch.randn(13, 5)}
    model = mlp(torch.float32)
    run = windows([batch], sgd(model), micro_batch=2, accumulation_steps=2)
    with pytest.raises(SampleError, match=r"patches has the shape \(13, 5\)"):
        next(iter(run))
    whole = windows(
        [batch], sgd(model), micro_batch=2, accumulation_steps=2, batch_dims={"patches": None}
    )
    assert [len(part["patches"]) for part in drawn(whole)] == [13, 13]


@pytest.fixture(autouse=True)
def _without_a_word_of_no_gradients() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "no parameter of the optimizers has a gradient")
        yield


def drawn(run: Windows) -> list[Any]:
    """The micro-batches of the first window, run with a loss that needs no model."""
    anything = torch.ones((), requires_grad=True)
    window = next(iter(run))
    seen = []
    for batch in window:
        seen.append(batch)
        window.backward(anything * 1)
    return seen


def test_a_last_batch_of_one_sample_is_read_as_those_before_it() -> None:
    """Beside class weights, or the state of a recurrent layer."""
    model = nn.Linear(5, 5).double()
    weights = torch.rand(5, dtype=torch.float64)
    x = torch.randn(9, 5, dtype=torch.float64)
    loader = [(part, torch.zeros(len(part)), weights) for part in x.split(4)]
    run = windows(loader, sgd(model), micro_batch=4, accumulation_steps=3)
    (window,) = stepped(run, lambda batch: (model(batch[0]) * batch[2]).square().mean())
    assert window.samples == 9 and window.micro_batches == (4, 4, 1)


def test_a_single_sample_beside_a_list_of_numbers_asks() -> None:
    model = nn.Linear(5, 5)
    with pytest.raises(SampleError, match="5 samples or 1"):
        next(
            iter(
                windows(
                    [(torch.ones(1, 5), torch.ones(5))],
                    sgd(model),
                    micro_batch=1,
                    accumulation_steps=1,
                )
            )
        )


@dataclasses.dataclass
class Normalised:
    x: Tensor

    def __post_init__(self) -> None:
        self.x = self.x * 2


@pytest.mark.parametrize("loaded", [2, 8])
def test_a_batch_is_handed_out_and_cut_without_being_made_again(loaded: int) -> None:
    model = mlp()
    x = torch.randn(8, 5, dtype=torch.float64)
    loader = [Normalised(part) for part in x.split(loaded)]
    run = windows(loader, sgd(model), micro_batch=2, accumulation_steps=4)
    seen = []
    for window in run:
        for batch in window:
            seen.append(batch.x)
            window.backward(model(batch.x).square().mean())
        window.step()
    assert torch.equal(torch.cat(seen), 2 * x)


@pytest.mark.filterwarnings("ignore::autobatch.AutobatchWarning")
def test_batches_of_a_kind_of_their_own_are_counted_and_cut_by_functions() -> None:
    batch = ["abc", "de", "f"]
    run = windows(
        [batch, batch],
        sgd(mlp()),
        micro_batch=2,
        accumulation_steps=2,
        count=len,
        cut=lambda rows, start, stop: rows[start:stop],
    )
    assert drawn(run) == [["abc", "de"], ["f"], ["abc"]]


def test_only_counted_batches_are_not_cut() -> None:
    run = windows([[1, 2, 3]], sgd(mlp()), micro_batch=2, accumulation_steps=3, count=len)
    with pytest.raises(SampleError, match="a batch of 3 samples has to be cut at 2"):
        next(iter(run))


def naive_partial_window(model: nn.Module, data: Tensor, micro_batch: int, steps: int) -> None:
    """Divide by the number of steps, however many micro-batches there are."""
    for part in data.split(micro_batch):
        (model(part).square().mean() / steps).backward()


def test_the_last_partial_window_is_not_underscaled() -> None:
    """Lightning #19987: a window of 1 of 4 micro-batches got a quarter of its gradient."""
    data = torch.randn(3, 5, dtype=torch.float64)
    whole, naive, model = mlp(), mlp(), mlp()
    whole(data).square().mean().backward()
    naive_partial_window(naive, data, micro_batch=3, steps=4)
    optimizer = Watched(model)
    for window in windows([data], optimizer, micro_batch=3, accumulation_steps=4):
        for x in window:
            window.backward(model(x).square().mean())
        window.step()
    assert differs(gradients(naive), gradients(whole)) == pytest.approx(3 / 4)
    assert differs(optimizer.seen[0], gradients(whole)) <= 1e-12


def test_the_last_partial_window_is_not_dropped() -> None:
    """NeMo Automodel PR #2257: samples after the last whole window were never trained on."""
    loader = DataLoader(torch.randn(10, 5, dtype=torch.float64), batch_size=2)
    naive = sum(step % 2 for step, _ in enumerate(loader)) * 4
    model, samples = mlp(), 0
    for window in windows(loader, sgd(model), micro_batch=2, accumulation_steps=2):
        for x in window:
            window.backward(model(x).mean())
        window.step()
        samples += window.samples
    assert (naive, samples) == (8, 10)
    dropping = windows(loader, sgd(model), micro_batch=2, accumulation_steps=2, drop_last=True)
    assert len(dropping) == 2 and sum(1 for _ in stepped(dropping, square(model))) == 2


def test_a_mean_of_means_is_not_the_mean_over_tokens() -> None:
    """transformers PR #34191, torchtune PR #1875, unsloth PR #1134."""
    batches = token_batches([1, 11])
    whole = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
    full, naive, model = mlp(), mlp(), mlp()
    token_loss(full, whole).backward()
    for batch in batches:
        (token_loss(naive, batch) / len(batches)).backward()
    optimizer = Watched(model)
    for window in windows(batches, optimizer, micro_batch=2, accumulation_steps=2, weight=tokens):
        window.run(lambda batch: token_loss(model, batch))
        window.step()
    assert differs(gradients(naive), gradients(full)) > 0.1
    assert differs(optimizer.seen[0], gradients(full)) <= 1e-12
    assert window.loss.item() == pytest.approx(token_loss(full, whole).item(), rel=1e-12)


def test_a_sum_over_tokens_is_divided_by_the_windows_tokens_once() -> None:
    """transformers PR #35438, #37474: scaled by the steps as well as by the tokens."""
    batches = token_batches([3, 7])
    whole = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}

    def summed(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return token_loss(model, batch) * tokens(batch)

    full, naive, model = mlp(), mlp(), mlp()
    token_loss(full, whole).backward()
    for batch in batches:
        (summed(naive, batch) / 10 / len(batches)).backward()
    optimizer = Watched(model)
    run = windows(
        batches,
        optimizer,
        micro_batch=2,
        accumulation_steps=2,
        weight=tokens,
        reduction="sum",
    )
    for window in run:
        window.run(lambda batch: summed(model, batch))
        window.step()
    assert differs(gradients(naive), gradients(full)) == pytest.approx(0.5)
    assert differs(optimizer.seen[0], gradients(full)) <= 1e-12


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning")
def test_the_schedule_steps_once_a_window() -> None:
    """accelerate #963: stepped for every micro-batch, the rate decays too fast."""
    data = DataLoader(torch.randn(16, 5, dtype=torch.float64), batch_size=2)
    model, naive = mlp(), mlp()
    optimizer, other = sgd(model), sgd(naive)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    wrong = torch.optim.lr_scheduler.StepLR(other, step_size=1, gamma=0.5)
    for step, x in enumerate(data):
        (naive(x).mean() / 4).backward()
        if step % 4 == 3:
            other.step()
            other.zero_grad()
        wrong.step()
    run = windows(data, optimizer, micro_batch=2, accumulation_steps=4, scheduler=scheduler)
    assert sum(1 for _ in stepped(run, square(model))) == 2
    assert scheduler.get_last_lr() == [0.1 * 0.5**2]
    assert wrong.get_last_lr() == [0.1 * 0.5**8]


def test_a_schedule_that_follows_a_metric_is_refused() -> None:
    optimizer = sgd(mlp())
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    with pytest.raises(UsageError, match=r"call its step\(metric\) yourself"):
        windows([], optimizer, micro_batch=1, accumulation_steps=1, scheduler=scheduler)


class ByEpoch:
    """A schedule as timm's are."""

    def step(self, epoch: int, metric: float | None = None) -> None:
        raise AssertionError(f"stepped in epoch {epoch}, {metric}")


class Passing:
    """A wrapper as accelerate's is."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler

    def step(self, *args: Any, **kwargs: Any) -> None:
        self.scheduler.step(*args, **kwargs)


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (ByEpoch(), r"ByEpoch.step\(epoch\) needs what windows do not know: call it yourself"),
        (Passing(ByEpoch()), r"ByEpoch.step\(epoch\) needs"),
        (lambda step: 0.5, r"scheduler= holds function, which has no step\(\)"),
    ],
)
def test_a_schedule_that_cannot_be_stepped_is_refused_before_anything_is_updated(
    scheduler: Any, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        windows([], sgd(mlp()), micro_batch=1, accumulation_steps=1, scheduler=scheduler)


def test_an_optimizer_that_evaluates_in_its_step_is_refused_before_anything_runs() -> None:
    optimizer = torch.optim.LBFGS(mlp().parameters())
    with pytest.raises(UsageError, match="LBFGS computes the loss again from inside of its step"):
        windows([], optimizer, micro_batch=1, accumulation_steps=1)


def test_gradients_are_clipped_after_the_whole_window() -> None:
    data = 10 * torch.randn(8, 5, dtype=torch.float64)
    full, model = mlp(), mlp()
    full(data).square().mean().backward()
    norm = nn.utils.clip_grad_norm_(full.parameters(), 0.5)
    optimizer = Watched(model)
    run = windows([data], optimizer, micro_batch=2, accumulation_steps=4, clip_norm=0.5)
    (window,) = stepped(run, square(model))
    assert norm > 0.5
    assert window.grad_norm.item() == pytest.approx(norm.item(), rel=1e-12)
    assert differs(optimizer.seen[0], gradients(full)) <= 1e-12


def test_scaled_gradients_are_unscaled_before_they_are_clipped() -> None:
    data = torch.randn(8, 5)
    full, naive, model = (mlp(torch.float32) for _ in range(3))
    full(data).square().mean().backward()
    nn.utils.clip_grad_norm_(full.parameters(), 0.5)
    (1024 * naive(data).square().mean()).backward()
    nn.utils.clip_grad_norm_(naive.parameters(), 0.5)
    for p in naive.parameters():
        p.grad /= 1024
    optimizer = Watched(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    run = windows(
        [data], optimizer, micro_batch=2, accumulation_steps=4, clip_norm=0.5, scaler=scaler
    )
    (window,) = stepped(run, square(model))
    assert differs(gradients(naive), gradients(full)) > 0.9
    assert differs(optimizer.seen[0], gradients(full)) <= 1e-5
    assert not window.skipped
    assert window.loss.item() == pytest.approx(
        mlp(torch.float32)(data).square().mean().item(), rel=1e-5
    )


def test_the_schedule_waits_for_an_update_that_the_scaler_skipped() -> None:
    data = torch.full((4, 5), torch.inf)
    model = mlp(torch.float32)
    optimizer = sgd(model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    run = windows(
        [data],
        optimizer,
        micro_batch=2,
        accumulation_steps=2,
        scheduler=scheduler,
        scaler=scaler,
    )
    before = [p.clone() for p in model.parameters()]
    (window,) = stepped(run, square(model))
    assert window.skipped
    assert scheduler.get_last_lr() == [0.1]
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_gradients_are_dropped_not_zeroed_and_leftovers_do_not_count() -> None:
    data = torch.randn(4, 5, dtype=torch.float64)
    full, model = mlp(), mlp()
    full(data).square().mean().backward()
    (1e6 * model(data).sum()).backward()
    optimizer = Watched(model)
    list(stepped(windows([data], optimizer, micro_batch=2, accumulation_steps=2), square(model)))
    assert differs(optimizer.seen[0], gradients(full)) <= 1e-12
    assert all(p.grad is None for p in model.parameters())


def test_losses_of_one_micro_batch_may_come_one_by_one() -> None:
    data = torch.randn(4, 5, dtype=torch.float64)
    full, model = mlp(), mlp()
    (full(data).square().mean() + full(data).abs().mean()).backward()
    optimizer = Watched(model)
    for window in windows([data], optimizer, micro_batch=2, accumulation_steps=2):
        for x in window:
            window.backward(model(x).square().mean())
            window.backward(model(x).abs().mean())
        window.step()
    assert differs(optimizer.seen[0], gradients(full)) <= 1e-12
    assert window.loss.item() == pytest.approx(
        (mlp()(data).square().mean() + mlp()(data).abs().mean()).item(), rel=1e-12
    )


@pytest.mark.parametrize("stop", range(1, 6))
def test_training_resumes_in_the_middle_of_an_epoch(stop: int) -> None:
    """Also in the middle of a batch that was cut, and bit by bit."""
    data = TensorDataset(torch.randn(23, 5, dtype=torch.float64))
    loader = DataLoader(data, batch_size=8)

    def made() -> tuple[nn.Module, torch.optim.Optimizer, Windows]:
        model = mlp()
        optimizer = torch.optim.AdamW(model.parameters())
        run = windows(loader, optimizer, micro_batch=2, accumulation_steps=2)
        return model, optimizer, run

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return model(batch[0]).square().mean()

    def train(model: nn.Module, run: Windows, most: int = 99) -> dict[str, Any]:
        for done, window in enumerate(run, start=1):
            window.run(lambda batch: loss(model, batch))
            window.step()
            if done == most:
                break
        return run.state_dict()

    straight, _, run = made()
    train(straight, run)
    model, optimizer, run = made()
    place = train(model, run, stop)
    saved = copy.deepcopy([model.state_dict(), optimizer.state_dict(), place])
    assert place["windows"] == stop
    resumed, optimizer, run = made()
    resumed.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    run.load_state_dict(saved[2])
    train(resumed, run)
    for a, b in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    assert run.state_dict()["windows"] == 0


def test_iterating_again_begins_a_new_epoch_also_after_a_break() -> None:
    data = torch.randn(16, 5, dtype=torch.float64)
    model = mlp()
    run = windows(data.split(4), sgd(model), micro_batch=4, accumulation_steps=1)
    next(stepped(run, square(model)))
    assert run.state_dict()["windows"] == 1
    assert sum(1 for _ in stepped(run, square(model))) == 4


def test_resuming_with_other_windows_or_another_loader_is_refused() -> None:
    data = torch.randn(16, 5, dtype=torch.float64)
    model = mlp()
    run = windows(data.split(4), sgd(model), micro_batch=2, accumulation_steps=2)
    going = stepped(run, square(model))
    next(going), next(going)
    state = run.state_dict()
    other = windows(data.split(4), sgd(model), micro_batch=2, accumulation_steps=3)
    with pytest.raises(UsageError, match="the saved windows have 4 samples and these 6"):
        other.load_state_dict(state)
    shorter = windows(data[:4].split(4), sgd(model), micro_batch=2, accumulation_steps=2)
    shorter.load_state_dict(state)
    with pytest.raises(SampleError, match="the loader ends after 1 batches"):
        next(iter(shorter))


def one_window() -> tuple[nn.Module, Any]:
    model = mlp()
    run = windows(
        [torch.randn(4, 5, dtype=torch.float64)] * 2,
        sgd(model),
        micro_batch=2,
        accumulation_steps=2,
    )
    return model, run


def test_a_window_that_is_left_before_its_step_is_an_error() -> None:
    model, run = one_window()
    unfinished = iter(run)
    for x in (window := next(unfinished)):
        window.backward(model(x).mean())
    with pytest.raises(WorkloadError, match="window 0 was left before"):
        next(unfinished)


def test_a_step_before_the_last_micro_batch_is_an_error() -> None:
    model, run = one_window()
    window = next(iter(run))
    window.backward(model(next(micro := iter(window))).mean())
    with pytest.raises(WorkloadError, match="2 of 2 micro-batches left"):
        window.step()
    micro.close()


def test_a_micro_batch_without_a_backward_is_an_error() -> None:
    _, run = one_window()
    micro = iter(next(iter(run)))
    next(micro)
    with pytest.raises(WorkloadError, match="micro-batch 0 had no"):
        next(micro)


def test_a_second_step_is_an_error() -> None:
    model, run = one_window()
    window = next(stepped(run, square(model)))
    with pytest.raises(WorkloadError, match="twice"):
        window.step()


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (torch.ones(2, requires_grad=True), r"the loss has shape \(2,\), not one value"),
        (torch.ones(()), "has no gradient"),
        (1.0, "the loss is a float, not a tensor"),
    ],
)
def test_a_loss_that_is_no_scalar_with_a_gradient_is_an_error(loss: Any, message: str) -> None:
    _, run = one_window()
    micro = iter(window := next(iter(run)))
    next(micro)
    with pytest.raises(WorkloadError, match=message):
        window.backward(loss)


def test_a_backward_outside_a_micro_batch_is_an_error() -> None:
    _, run = one_window()
    with pytest.raises(WorkloadError, match="without a micro-batch"):
        next(iter(run)).backward(torch.ones((), requires_grad=True))


def test_the_loss_is_known_after_the_step_only() -> None:
    _, run = one_window()
    with pytest.raises(WorkloadError, match=r"after window.step\(\)"):
        _ = next(iter(run)).loss


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_an_impossible_weight_is_an_error(weight: float) -> None:
    run = windows(
        [torch.ones(2, 5)], sgd(mlp()), micro_batch=2, accumulation_steps=1, weight=lambda _: weight
    )
    with pytest.raises(UsageError, match="weight"):
        next(iter(run))


@pytest.mark.parametrize("sizes", [{"micro_batch": 0}, {"accumulation_steps": 0}])
def test_windows_of_nothing_are_refused(sizes: dict[str, int]) -> None:
    numbers = {"micro_batch": 1, "accumulation_steps": 1} | sizes
    with pytest.raises(UsageError):
        windows([], sgd(mlp()), **numbers)


def test_a_plan_for_other_gpus_is_refused() -> None:
    plan = plan_of(target=256, ceiling=100, world_size=2)
    with pytest.raises(UsageError, match="effective batch 128 instead of 256"):
        plan.windows([], sgd(mlp()))


def test_a_plan_clips_as_it_was_probed() -> None:
    plan = plan_of(target=4, ceiling=2)
    assert plan.model.clip_norm == 1.0
    model = mlp()
    optimizer = Watched(model)
    data = 100 * torch.randn(4, 5, dtype=torch.float64)
    (window,) = stepped(plan.windows([data], optimizer), square(model))
    clipped = torch.stack([g.norm() for g in optimizer.seen[0]]).norm()
    assert window.grad_norm > 1
    assert clipped.item() == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("batch_dims", [1, {"": 1}])
def test_a_plan_reads_batches_as_its_sample_was_read(batch_dims: Any) -> None:
    """`(T, B, F)` alone would be read as T samples."""
    model = nn.Linear(5, 3)
    rows = torch.randn(7, 4, 5)
    plan = tune(model, target=4, sample=rows, batch_dims=batch_dims, gpu="t4", cache=False)
    plan = Plan.from_json(plan.to_json())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    (window,) = stepped(plan.windows([rows], optimizer), square(model))
    assert window.samples == 4 and set(window.micro_batches) == {plan.micro_batch}


def test_batchnorm_sees_micro_batches() -> None:
    """pytorch #46516, Lightning #17446: nothing in a loop mends it, so it has to be said."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, 3)).double()
    whole, naive = copy.deepcopy(model), copy.deepcopy(model)
    data = torch.randn(8, 5, dtype=torch.float64)
    whole(data).square().mean().backward()
    for part in data.split(2):
        (naive(part).square().mean() / 4).backward()
    assert differs(gradients(naive), gradients(whole)) > 0.1
    found = check_equivalence(
        model, data, loss=lambda m, x: m(x).square().mean(), micro_batch=2, accumulation_steps=4
    )
    assert not found.equivalent
    assert [culprit.kind for culprit in found.culprits] == ["batchnorm"]


def test_in_batch_negatives_shrink() -> None:
    """sentence-transformers #2916: of 8 pairs in 4 micro-batches, each sees 1 negative, not 7."""

    def contrastive(model: nn.Module, x: Tensor) -> Tensor:
        return nn.functional.cross_entropy(model(x) @ model(x + 0.1).T, torch.arange(len(x)))

    whole, naive = mlp(), mlp()
    data = torch.randn(8, 5, dtype=torch.float64)
    contrastive(whole, data).backward()
    for part in data.split(2):
        (contrastive(naive, part) / 4).backward()
    assert differs(gradients(naive), gradients(whole)) > 0.1
    found = check_equivalence(mlp(), data, loss=contrastive, micro_batch=2, accumulation_steps=4)
    assert not found.equivalent
    assert [culprit.kind for culprit in found.culprits] == ["loss"]


def test_batches_that_were_made_in_inference_mode_train_as_others_do() -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        images = torch.randint(0, 255, (8, 5), dtype=torch.uint8, generator=generator)
        batches = [*images.split(4)]
    trained = []
    for loader in (batches, iter(batches), [image.clone() for image in batches]):
        model = mlp(torch.float32)
        run = windows(loader, sgd(model), micro_batch=2, accumulation_steps=4)
        for window in run:
            window.run(lambda batch, model=model: model(batch.float() / 255).square().mean())
            window.step()
        trained.append(model[0].weight.detach())
    assert torch.equal(trained[0], trained[2])
    assert torch.equal(trained[1], trained[2])


def test_a_state_of_a_larger_gpu_leaves_the_micro_batches_of_a_smaller_one() -> None:
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    batches = [torch.ones(8, 3)] * 4
    large = windows(batches, optimizer, micro_batch=8, accumulation_steps=1)
    small = windows(batches, optimizer, micro_batch=2, accumulation_steps=4)
    small_state = small.state_dict()
    small.load_state_dict(large.state_dict())
    assert small.sizes == (2, 2, 2, 2)
    large.load_state_dict(small_state)  # it may have run out of memory before
    assert large.sizes == (2, 2, 2, 2)


def test_an_optimizer_without_pytorchs_constructor_steps() -> None:
    class Wrapper(torch.optim.Optimizer):
        def __init__(self, inner: torch.optim.Optimizer) -> None:
            self.inner, self.param_groups = inner, inner.param_groups
            self.state, self.defaults = inner.state, inner.defaults

        def step(self, closure: Any = None) -> Any:
            return self.inner.step(closure)

        def zero_grad(self, set_to_none: bool = True) -> None:
            self.inner.zero_grad(set_to_none)

    model = nn.Linear(3, 1)
    before = model.weight.detach().clone()
    wrapper = Wrapper(torch.optim.SGD(model.parameters(), 0.1))
    for window in windows([torch.ones(4, 3)], wrapper, micro_batch=2, accumulation_steps=2):
        window.run(lambda batch: model(batch).square().mean())
        window.step()
    assert not torch.equal(model.weight, before)
