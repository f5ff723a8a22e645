"""Blocks that change state of theirs in a forward pass are not run twice as if they did not."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autobatch
from autobatch.errors import WorkloadError
from autobatch.levers.lever import Option
from autobatch.workload.workload import Workload
from tests.levers.setups import SAMPLES, options_of, peaks, setup_of
from tests.levers.test_numerics import assert_same, step

CHANNELS = 8


class Block(nn.Module):
    """A convolution, and whatever else happens in a forward pass."""

    def __init__(self, also: Callable[[Block, Tensor], object], norm: type[nn.Module]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        self.norm = norm(CHANNELS)
        self.register_buffer("mean", torch.zeros(CHANNELS))
        self.register_buffer("steps", torch.zeros(1, dtype=torch.long))
        self.register_buffer("queue", torch.zeros(256, CHANNELS))
        self.held = torch.zeros(CHANNELS)
        self.also = also

    def forward(self, x: Tensor) -> Tensor:
        x = x + F.silu(self.norm(self.conv(x)))
        self.also(self, x.detach())
        return x + self.mean[:, None, None]


def workload(
    also: Callable[[Block, Tensor], object] = lambda block, x: None,
    norm: Callable[[int], nn.Module] = nn.Identity,
    wrap: Callable[[nn.Module], nn.Module] = lambda layer: layer,
) -> Workload:
    torch.manual_seed(0)
    body = [Block(also, norm) for _ in range(4)]
    for block in body:
        block.conv = wrap(block.conv)
    model = nn.Sequential(nn.Conv2d(3, CHANNELS, 1), nn.Sequential(*body))
    return Workload(
        model=model,
        batch=lambda n: torch.linspace(0, 1, n * 3 * 64).view(n, 3, 8, 8),
        loss=lambda model, batch: model(batch).square().mean(),
    )


def checkpointed(run: Workload) -> dict[str, Option]:
    options = options_of(setup_of(run))
    return {label: one for label, one in options.items() if label.startswith("checkpointing")}


def averaged(block: Block, x: Tensor) -> None:
    block.mean.data.mul_(0.9).add_(x.mean((0, 2, 3)), alpha=0.1)


def interpolated(block: Block, x: Tensor) -> None:
    block.mean.lerp_(x.mean((0, 2, 3)), 0.1)


def rebound(block: Block, x: Tensor) -> None:
    block.mean = 0.9 * block.mean + 0.1 * x.mean((0, 2, 3))


def counted(block: Block, x: Tensor) -> None:
    block.steps += 1


def queued(block: Block, x: Tensor) -> None:
    end = int(block.steps)
    block.queue[end : end + len(x)] = x.mean((2, 3))
    block.steps[0] = (end + len(x)) % 256


def carried(block: Block, x: Tensor) -> None:
    block.held = 0.5 * block.held.to(x.device) + x.mean((0, 2, 3))


def normalized(block: Block, x: Tensor) -> None:
    F.batch_norm(x, block.mean, block.held.to(x.device).abs() + 1, training=True)


def of_python(block: Block, x: Tensor) -> None:
    random.random()


def of_numpy(block: Block, x: Tensor) -> None:
    np.random.rand()


CHANGING = {
    averaged: "its mean",
    interpolated: "its mean",
    rebound: "its mean",
    counted: "its steps",
    queued: "its steps",
    carried: "its held",
    normalized: "its mean",
    of_python: "random numbers",
    of_numpy: "random numbers",
}


@pytest.mark.parametrize("also", CHANGING, ids=lambda also: also.__name__)
def test_a_block_that_changes_its_state_is_not_checkpointed(also):
    for option in checkpointed(workload(also)).values():
        with pytest.raises(WorkloadError, match=rf"1\.\d \(Block\) .*{CHANGING[also]}.*runs twice"):
            peaks(option.apply(setup_of(workload(also))))


class Counter(nn.Identity):
    count = 0

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return super().forward(x)


class Diary(nn.Identity):
    def forward(self, x: Tensor) -> Tensor:
        vars(self).setdefault("seen", []).append(x.mean().detach())
        return super().forward(x)


@pytest.mark.parametrize(("kind", "held"), [(Counter, "norm.count"), (Diary, "norm.seen")])
def test_a_block_in_which_python_counts_is_not_checkpointed(kind, held):
    for option in checkpointed(workload(norm=lambda channels: kind())).values():
        with pytest.raises(WorkloadError, match=rf"changes its {held} each time.*runs twice"):
            peaks(option.apply(setup_of(workload(norm=lambda channels: kind()))))


def test_advise_leaves_it_out_and_says_why():
    run = workload(averaged)
    advice = autobatch.advise(run, target=SAMPLES, gpu="t4", levers=["checkpointing"])
    assert not advice.choices
    assert all("changes its mean from what it was" in note for note in advice.notes)


def last_seen(block: Block, x: Tensor) -> None:
    block.mean.copy_(x.mean((0, 2, 3)))


def remembered(block: Block, x: Tensor) -> None:
    block.held = torch.arange(CHANNELS, device=x.device)


def clamped(block: Block, x: Tensor) -> None:
    block.mean.clamp_(-1, 1)


def of_a_shape(block: Block, x: Tensor) -> None:
    block.shape, block.names = tuple(x.shape), ["x"]


@pytest.mark.parametrize(
    "also", [last_seen, remembered, clamped, of_a_shape], ids=lambda also: also.__name__
)
def test_what_is_the_same_after_a_second_run_may_be_written(also):
    for option in checkpointed(workload(also)).values():
        assert not option.changes_numerics
        allocated, _ = peaks(option.apply(setup_of(workload(also))))
        assert allocated > 0
        assert_same(step(workload(also), option.code), step(workload(also), ""))


def instance_norm(channels: int) -> nn.Module:
    return nn.InstanceNorm2d(channels, track_running_stats=True, affine=True)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, instance_norm])
def test_averages_of_norms_end_where_one_run_puts_them(norm):
    run = workload(norm=norm)
    options = checkpointed(run)
    assert len(options) > 3
    for option in options.values():
        assert not option.changes_numerics
        assert_same(step(workload(norm=norm), option.code), step(run, ""))
        peaks(option.apply(setup_of(run)))  # not refused


def test_blocks_before_all_that_is_trained_are_left_out():
    def run() -> Workload:
        training = workload(norm=nn.BatchNorm2d)
        stem, body = training.model
        for frozen in (stem, *body[:2]):
            frozen.requires_grad_(False)
        return training

    options = checkpointed(run())
    assert "2 of 2 blocks" in options["checkpointing: every block"].what
    for option in options.values():
        assert_same(step(run(), option.code), step(run(), ""))
        peaks(option.apply(setup_of(run())))


def test_blocks_that_do_not_run_again_although_something_is_trained_first_are_refused():
    training = workload(norm=nn.BatchNorm2d)
    stem, body = training.model
    stem.requires_grad_(False)
    body.requires_grad_(False)
    training.model.head = nn.Linear(8, 8)
    training.model.prompt = nn.Parameter(torch.zeros(8))
    for option in checkpointed(training).values():
        with pytest.raises(WorkloadError, match="does not run again"):
            peaks(option.apply(setup_of(training)))


@pytest.mark.parametrize("wrap", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm])
def test_a_spectral_norm_changes_numbers_and_the_option_says_so(wrap):
    run = workload(wrap=wrap)
    for option in checkpointed(run).values():
        assert option.changes_numerics
        assert "power iteration" in option.what
        peaks(option.apply(setup_of(run)))  # not refused: whoever asks for it may have it
    changed = step(workload(wrap=wrap), checkpointed(run)["checkpointing: every block"].code)
    plain = step(workload(wrap=wrap), "")
    # the note is true: were it not, the mark should go
    assert any(not torch.allclose(value, plain[name]) for name, value in changed.items())


class OwnMethod(nn.Module):
    """Checkpoints its blocks as models of Transformers do."""

    supports_gradient_checkpointing = True

    def __init__(self, run: Workload) -> None:
        super().__init__()
        self.stem, self.blocks = run.model
        for block in self.blocks:
            block.gradient_checkpointing = False

    def gradient_checkpointing_enable(self, how: dict[str, object]) -> None:
        for block in self.blocks:
            block.gradient_checkpointing = True

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            if block.gradient_checkpointing:
                x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x


def test_averages_are_kept_where_the_model_checkpoints_its_own_blocks():
    def own() -> Workload:
        run = workload(norm=nn.BatchNorm2d)
        return Workload(model=OwnMethod(run), batch=run.batch, loss=run.loss)

    for label in ("checkpointing: every block", "checkpointing: every 2nd block"):
        option = checkpointed(own())[label]
        assert "gradient_checkpointing_enable" in option.code
        assert option.trainer is None  # its arguments cannot say the momentum
        assert_same(step(own(), option.code), step(own(), ""))
