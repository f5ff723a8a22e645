"""Running out of memory in the middle of a training window, on one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from autobatch import AutobatchWarning, DoesNotFitError, windows
from tests.support.shortages import MICRO_BATCH, STEPS, Net, Stumble, data, optimizer_of, train

TOLERANCE = 1e-12


def trained(
    stumble: Stumble, optimizer: str = "adamw", **options: Any
) -> tuple[list[torch.Tensor], list[str], list[tuple[int, ...]]]:
    model = Net()
    updates = optimizer_of(optimizer, model)
    run = windows(
        data(0).split(MICRO_BATCH),
        updates,
        micro_batch=MICRO_BATCH,
        accumulation_steps=STEPS,
        clip_norm=1.0,
        **options,
    )
    sizes: list[tuple[int, ...]] = []
    said = train(model, model, run, updates, stumble, lambda w: sizes.append(w.micro_batches))
    return [p.detach() for p in model.parameters()], said, sizes


def assert_close(left: list[torch.Tensor], right: list[torch.Tensor]) -> None:
    for a, b in zip(left, right, strict=True):
        torch.testing.assert_close(a, b, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.fixture(scope="module")
def undisturbed() -> list[torch.Tensor]:
    parameters, said, sizes = trained(Stumble(None, 0, 0))
    assert not said and sizes == [(MICRO_BATCH,) * STEPS] * 10
    return parameters


@pytest.mark.slow
@pytest.mark.parametrize("window", [0, 4])
@pytest.mark.parametrize("index", range(STEPS))
@pytest.mark.parametrize("place", ["inputs", "forward", "loss", "backward"])
def test_a_micro_batch_that_runs_out_of_memory_is_split(
    place: str, index: int, window: int, undisturbed: list[torch.Tensor]
) -> None:
    stumble = Stumble(place, window, index)
    parameters, said, sizes = trained(stumble)
    assert stumble.shortages == 1
    assert_close(parameters, undisturbed)
    split = [MICRO_BATCH] * STEPS
    split[index : index + 1] = [2, 2]
    assert sizes[window] == tuple(split)
    assert sizes[:window] + sizes[window + 1 :] == [(MICRO_BATCH,) * STEPS] * 9
    assert len(said) == 1
    assert f"window {window}: a micro-batch of 4 ran out of memory" in said[0]
    assert "Tried to allocate 2.00 GiB" in said[0]
    assert "the effective batch stays 12 samples" in said[0]


def test_halves_share_the_weight_that_their_micro_batch_had() -> None:
    """Also where weights do not add up, such as one for every micro-batch."""
    expected, _, _ = trained(Stumble(None, 0, 0), weight=lambda x: 1.0)
    parameters, _, sizes = trained(Stumble("forward", 4, 1), weight=lambda x: 1.0)
    assert sizes[4] == (4, 2, 2, 4)
    assert_close(parameters, expected)


@pytest.mark.parametrize("place", ["forward", "backward"])
def test_halves_are_split_again(place: str, undisturbed: list[torch.Tensor]) -> None:
    parameters, _, sizes = trained(Stumble(place, 2, 1, times=2))
    assert_close(parameters, undisturbed)
    assert sizes[2] == (4, 1, 1, 2, 4)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("window", [0, 4])
def test_an_update_that_fails_before_it_changes_anything_is_repeated(
    window: int, optimizer: str
) -> None:
    stumble = Stumble("step", window, 0)
    expected, _, _ = trained(Stumble(None, 0, 0), optimizer)
    parameters, said, _ = trained(stumble, optimizer)
    assert stumble.shortages == 1
    assert_close(parameters, expected)
    assert len(said) == 1 and "the optimizer's update ran out of memory" in said[0]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("window", [0, 4])
@pytest.mark.parametrize("index", [1, 2])
def test_an_update_that_fails_in_the_middle_is_taken_back_and_repeated(
    index: int, window: int, optimizer: str
) -> None:
    expected, _, _ = trained(Stumble(None, 0, 0), optimizer)
    parameters, _, _ = trained(Stumble("step", window, index), optimizer, guard_update=True)
    assert_close(parameters, expected)


def test_after_one_update_without_memory_the_next_ones_can_be_taken_back() -> None:
    expected, _, _ = trained(Stumble(None, 0, 0))
    model = Net()
    updates = optimizer_of("adamw", model)
    run = windows(
        data(0).split(MICRO_BATCH), updates, micro_batch=4, accumulation_steps=3, clip_norm=1.0
    )
    stumble = Stumble("step", 2, 0)

    def again_in_the_middle(_: Any) -> None:
        if run.state_dict()["windows"] == 5:
            stumble.window, stumble.index, stumble.left = 5, 1, 1

    train(model, model, run, updates, stumble, again_in_the_middle)
    assert stumble.shortages == 2
    assert_close([p.detach() for p in model.parameters()], expected)


def test_an_update_cut_short_without_a_copy_says_that_parameters_are_mixed() -> None:
    with pytest.raises(DoesNotFitError, match=r"go back to the last checkpoint.*guard_update"):
        trained(Stumble("step", 4, 1))


def test_an_update_that_never_fits_leaves_the_parameters_as_they_were() -> None:
    model = Net()
    updates = optimizer_of("adamw", model)
    run = windows([data(0, 4)], updates, micro_batch=4, accumulation_steps=1, guard_update=True)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(DoesNotFitError, match="ran out of memory twice"):
        train(model, model, run, updates, Stumble("step", 0, 2, times=2))
    for p, kept in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, kept)
    assert not updates.state


def test_a_sample_that_never_fits_ends_with_one_clear_line() -> None:
    with pytest.raises(DoesNotFitError, match="a micro-batch of one sample runs out of memory"):
        trained(Stumble("forward", 1, 0, times=99))


def test_retries_are_limited() -> None:
    with pytest.raises(DoesNotFitError, match="out of memory 2 times in one window, more than"):
        trained(Stumble("forward", 1, 0, times=99), retries=1)


@pytest.mark.slow
def test_repeated_trouble_lowers_the_micro_batch_and_says_so() -> None:
    class Often(Stumble):
        def __call__(self, window: int, x: torch.Tensor) -> str | None:
            return "forward" if len(x) > 2 else None

    expected, _, _ = trained(Stumble(None, 0, 0))
    parameters, said, sizes = trained(Often(None, 0, 0))
    assert_close(parameters, expected)
    assert sizes == [(2,) * 6] * 10
    assert len(said) == 3
    assert "window 0" in said[0] and "window 1" in said[1]
    assert "lowered from 4 to 2 for all that follow, with 6 accumulation steps" in said[2]
    assert "the effective batch stays 12" in said[2]


def test_a_lowered_micro_batch_is_kept_when_training_resumes() -> None:
    model = Net()
    updates = optimizer_of("adamw", model)
    run = windows(data(0).split(4), updates, micro_batch=4, accumulation_steps=3)
    run.sizes = (2,) * 6
    other = windows(data(0).split(4), updates, micro_batch=4, accumulation_steps=3)
    other.load_state_dict(run.state_dict())
    assert other.sizes == (2,) * 6


def test_other_errors_of_the_loss_are_the_users_own() -> None:
    def loss(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    run = windows([data(0, 4)], optimizer_of("sgd", Net()), micro_batch=4, accumulation_steps=1)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        next(iter(run)).run(loss)


def test_what_the_failed_attempt_held_is_gone_before_the_next() -> None:
    """A loss in a variable keeps its whole graph; of a function it goes with the function."""
    import weakref

    held: list[Any] = []
    model = Net()

    def loss(x: torch.Tensor) -> torch.Tensor:
        if held:
            assert held[0]() is None
        activations = model.first(x)
        result = activations.square().mean()
        if not held:
            held.append(weakref.ref(activations))
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return result

    run = windows([data(0, 4)], optimizer_of("sgd", model), micro_batch=4, accumulation_steps=1)
    window = next(iter(run))
    with pytest.warns(AutobatchWarning):
        window.run(loss)
    assert held[0]() is None and window.micro_batches == (2, 2)
