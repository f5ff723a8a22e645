"""A window that is computed again after a lack of memory equals the one that had enough."""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from autobatch import AutobatchWarning, DoesNotFitError, windows
from tests.support.shortages import OOM, _Fails

pytestmark = pytest.mark.filterwarnings("ignore::autobatch.AutobatchWarning")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1)
    ).double()


def data(samples: int = 32) -> Tensor:
    return torch.randn(samples, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


class Trouble:
    """Runs out of memory at calls of a loss function, in its forward or backward pass."""

    def __init__(self, *calls: int, place: str = "backward") -> None:
        self.calls, self.place, self.count = calls, place, 0

    def __call__(self, output: Tensor) -> Tensor:
        self.count += 1
        if self.count not in self.calls:
            return output
        if self.place == "forward":
            raise torch.OutOfMemoryError(OOM)
        return _Fails.apply(output)  # type: ignore[no-any-return]


def train(
    net: nn.Module, trouble: Trouble, loss: Callable[[Tensor], Tensor], **options: Any
) -> None:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    run = windows(data().split(4), optimizer, micro_batch=4, accumulation_steps=4, **options)
    for window in run:
        window.run(lambda batch: trouble(loss(batch)).square().mean())
        window.step()


@pytest.mark.parametrize("call", [2, 4, 6])
def test_statistics_are_as_without_the_shortage(call: int) -> None:
    """Each sample of the window is in them once, in a micro-batch or in halves of it."""
    models = [network(), network()]
    counts = []
    for model, trouble in zip(models, (Trouble(), Trouble(call)), strict=True):
        train(model, trouble, model, model=model)
        counts.append(int(model[1].num_batches_tracked))
    assert counts == [8, 9]


@pytest.mark.parametrize("call", [1, 3, 6])
def test_a_forward_pass_that_was_cut_short_leaves_no_statistics_behind(call: int) -> None:
    model = network()
    train(model, Trouble(call, place="forward"), model, model=model)
    assert int(model[1].num_batches_tracked) == 9


def test_other_numbers_are_drawn_only_for_what_was_split() -> None:
    """The random states go back: micro-batches before the split one draw as they did."""
    drawn: list[list[Any]] = []
    for trouble in (Trouble(), Trouble(3)):
        torch.manual_seed(1)
        random.seed(1)
        np.random.seed(1)
        model = nn.Linear(5, 1).double()
        seen: list[Any] = []

        def loss(batch: Tensor, model: nn.Module = model, seen: list[Any] = seen) -> Tensor:
            seen.append((len(batch), torch.rand(1).item(), random.random(), np.random.rand()))
            return model(batch)

        train(model, trouble, loss)
        drawn.append(seen)
    undisturbed, repeated = drawn
    assert repeated[:3] == undisturbed[:3]
    assert repeated[3:5] == undisturbed[:2]
    assert [size for size, *_ in repeated[5:8]] == [2, 2, 4]


@pytest.mark.parametrize("given", [False, True])
def test_gradients_of_leaves_that_others_step_are_counted_once(given: bool) -> None:
    """Found in model=, or in the graph of the first loss."""
    models = []
    for trouble in (Trouble(), Trouble(2, 7)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1)).double()
        own = torch.optim.SGD(model[2].parameters(), lr=0.1)
        run = windows(
            data().split(4),
            torch.optim.SGD(model[0].parameters(), lr=0.1),
            micro_batch=4,
            accumulation_steps=4,
            model=model if given else None,
        )
        for number, window in enumerate(run):
            window.run(lambda b, m=model, t=trouble: t(m(b)).square().mean())
            window.step()
            if number % 2:  # over two windows, so that gradients are there when one begins
                own.step()
                own.zero_grad()
        models.append(model)
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def _pops(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    return model(batch["x"])[:, 0] - batch.pop("y")


def _replaces(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    batch["x"] = batch["x"] * 2
    return model(batch["x"])[:, 0] - batch["y"]


def _empties_a_list(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    names = [batch["names"].pop() for _ in range(len(batch["x"]))]
    return model(batch["x"])[:, 0] * (names[-1] != "")


def _nested(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    inner = batch["inner"]
    inner["z"] = inner["z"] + 1
    return model(batch["x"])[:, 0] * inner["z"]


@pytest.mark.parametrize("forward", [_pops, _replaces, _empties_a_list, _nested])
@pytest.mark.parametrize("call", [1, 3])
def test_a_micro_batch_that_runs_again_is_what_the_loader_gave(
    forward: Callable[[nn.Module, dict[str, Any]], Tensor], call: int
) -> None:
    models = []
    for trouble in (Trouble(), Trouble(call)):
        torch.manual_seed(0)
        model = nn.Linear(5, 1).double()
        loader = [
            {"x": x, "y": x[:, 0], "names": [*"abcd"], "inner": {"z": x[:, 1]}}
            for x in data().split(4)
        ]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for window in windows(loader, optimizer, micro_batch=4, accumulation_steps=4):
            window.run(lambda b, m=model, t=trouble: t(forward(m, b)).square().mean())
            window.step()
        models.append(model)
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("call", [1, 3])
@pytest.mark.parametrize("place", ["forward", "backward"])
def test_a_micro_batch_that_was_written_to_does_not_run_again(place: str, call: int) -> None:
    model = nn.Linear(5, 1).double()
    trouble = Trouble(call, place=place)
    window = next(
        iter(
            windows(
                data().split(4),
                torch.optim.SGD(model.parameters(), lr=0.1),
                micro_batch=4,
                accumulation_steps=4,
            )
        )
    )
    with pytest.raises(DoesNotFitError, match=r"writes to .*tensors in place"):
        window.run(lambda batch: trouble(model(batch.mul_(2))).square().mean())


def test_objects_in_circles_are_collected_before_the_next_attempt() -> None:
    """Recurrent caches and closures hold each other, and with them the failed graph."""
    held: list[Any] = []
    model = nn.Linear(5, 1).double()

    def loss(batch: Tensor) -> Tensor:
        if held:
            assert held[0]() is None
        output = model(batch)
        circle: dict[str, Any] = {"activations": output * 2}
        circle["itself"] = circle
        if not held:
            held.append(weakref.ref(circle["activations"]))
            raise torch.OutOfMemoryError(OOM)
        return output.square().mean()

    run = windows(
        [data(4)], torch.optim.SGD(model.parameters(), lr=0.1), micro_batch=4, accumulation_steps=1
    )
    gc.disable()
    try:
        with pytest.warns(AutobatchWarning):
            next(iter(run)).run(loss)
    finally:
        gc.enable()
    assert held[0]() is None


def test_large_buffers_that_a_pass_leaves_alone_are_not_copied() -> None:
    model = network()
    model.register_buffer("mask", torch.ones(100, 100))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = windows(data().split(4), optimizer, micro_batch=4, accumulation_steps=4, model=model)
    names = []
    for window in run:
        names.append([name for _, name, _, _ in run._training.rewind.buffers()])
        window.run(lambda batch: model(batch).square().mean())
        window.step()
    statistics = ["running_mean", "running_var", "num_batches_tracked"]
    assert names == [["mask", *statistics], statistics]


class Replaces(nn.Module):
    """Keeps an average in a buffer that each pass replaces."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 1).double()
        self.register_buffer("average", torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        self.average = 0.5 * self.average + x.detach().abs().mean() * len(x)
        return self.layer(x)


def test_buffers_that_are_replaced_are_put_back() -> None:
    seen = []
    for trouble in (Trouble(), Trouble(4)):
        model = Replaces()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        run = windows(
            data(16).split(4), optimizer, micro_batch=4, accumulation_steps=4, model=model
        )
        for window in run:
            window.run(lambda b, m=model, t=trouble: t(m(b)).square().mean())
            window.step()
        seen.append(model.average.item())
    whole, parts = seen
    sums = [part.abs().mean().item() * 4 for part in data(16).split(4)]
    last = data(16)[12:].split(2)
    three = 0.25 * sums[0] + 0.5 * sums[1] + sums[2]
    expected = 0.25 * three + sum(
        h.abs().mean().item() * 2 * f for h, f in zip(last, (0.5, 1), strict=True)
    )
    assert whole == pytest.approx(0.5 * three + sums[3]) and parts == pytest.approx(expected)
