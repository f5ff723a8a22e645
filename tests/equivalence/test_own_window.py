"""Loops of the user's own: the gradient at their step is that of the whole batch, or not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autobatch import UsageError, Workload, WorkloadError, check_equivalence
from tests.equivalence.networks import EXACT, kinds, mean_square, network, samples


def by_count(model: nn.Module, optimizer: Any, batches: Iterator[Any]) -> None:
    every = list(batches)
    total = sum(len(batch[0]) for batch in every)
    for batch in every:
        (mean_square(model, batch) * (len(batch[0]) / total)).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 100.0)
    optimizer.step()
    optimizer.zero_grad()


def by_steps(model: nn.Module, optimizer: Any, batches: Iterator[Any]) -> None:
    for batch in batches:
        (mean_square(model, batch) / 2).backward()
    optimizer.step()
    optimizer.zero_grad()


def of_the_last(model: nn.Module, optimizer: Any, batches: Iterator[Any]) -> None:
    for batch in batches:
        optimizer.zero_grad()
        mean_square(model, batch).backward()
    optimizer.step()


def undivided(model: nn.Module, optimizer: Any, batches: Iterator[Any]) -> None:
    for batch in batches:
        mean_square(model, batch).backward()
    optimizer.step()


def check(window: Callable[..., None], model: nn.Module | None = None, **options: Any) -> Any:
    return check_equivalence(model or network(), samples(), window=window, **options)


def test_a_loop_that_weights_by_samples_is_equivalent() -> None:
    for options in ({}, {"loss": mean_square}):
        result = check(by_count, **options)
        assert result.equivalent, str(result)
        assert result.difference < EXACT
        assert result.loss == "window function"


def test_a_loop_that_divides_by_its_steps_is_exact_for_equal_sizes_alone() -> None:
    result = check(by_steps, loss=mean_square)
    assert not result.equivalent
    assert kinds(result) == ["weight"]
    assert result.comparisons[0].difference < EXACT < result.comparisons[1].difference


def test_a_loop_that_keeps_the_last_gradient_is_not_equivalent() -> None:
    assert check(of_the_last).equivalent is False


def test_a_factor_is_seen_where_the_loss_is_known_and_said_where_not() -> None:
    assert check(undivided, loss=mean_square).equivalent is False
    assert "a factor that is common to both is not seen" in check(by_count).notes[-1]


def test_a_workload_with_a_window_is_checked() -> None:
    workload = Workload(model=network(), batch=samples, window=by_count)
    assert check_equivalence(workload).equivalent


def test_dropout_is_given_by_row_and_batch_norm_is_found() -> None:
    assert check(by_count, network(nn.Dropout(0.4)), loss=mean_square).equivalent
    assert check(by_count, network(nn.Dropout(0.4))).equivalent
    assert check(by_count, network(nn.BatchNorm1d(8)), loss=mean_square).equivalent is False


def test_the_users_optimizer_does_not_step() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    before = [p.detach().clone() for p in model.parameters()]
    workload = Workload(model=model, batch=samples, window=by_count, optimizer=optimizer)
    assert check_equivalence(workload).equivalent
    assert all(map(torch.equal, model.parameters(), before))
    assert "step" not in vars(optimizer)


def test_a_loop_that_steps_not_once_is_refused() -> None:
    def twice(model: nn.Module, optimizer: Any, batches: Iterator[Any]) -> None:
        for batch in batches:
            mean_square(model, batch).backward()
            optimizer.step()

    with pytest.raises(WorkloadError, match="steps more than once"):
        check(twice)
    with pytest.raises(WorkloadError, match="made no step"):
        check(lambda model, optimizer, batches: None)
    with pytest.raises(UsageError, match="or a weight"):
        check(by_count, weight=len)


def clipping(model: nn.Module, optimizer: Any, batches: Iterator[Any], *, each: bool) -> None:
    every = list(batches)
    total = sum(len(batch[0]) for batch in every)
    for batch in every:
        (mean_square(model, batch) * (len(batch[0]) / total)).backward()
        if each or batch is every[-1]:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    optimizer.step()


def test_a_loop_that_clips_the_gradient_of_its_window_is_equivalent() -> None:
    result = check(partial(clipping, each=False), loss=mean_square)
    assert result.equivalent, str(result)
    assert any("as clipping does" in note for note in result.notes)
    assert not check(partial(clipping, each=True), loss=mean_square).equivalent


def test_a_step_with_another_gradient_than_the_losss_is_told_apart() -> None:
    (culprit,) = check(undivided, loss=mean_square).culprits
    assert "whole batch at once" not in culprit.finding  # its micro-batches are added up undivided
    (culprit,) = check(doubled, loss=mean_square).culprits
    assert "the same where the function gets the whole batch at once" in culprit.finding


def doubled(model: nn.Module, optimizer: Any, batches: Iterator[Any]) -> None:
    every = list(batches)
    total = sum(len(batch[0]) for batch in every)
    for batch in every:
        (2 * mean_square(model, batch) * (len(batch[0]) / total)).backward()
    optimizer.step()


def token_mean(model: nn.Module, batch: Any) -> Tensor:
    inputs, labels = batch
    return nn.functional.cross_entropy(model(inputs).flatten(0, 1), labels.flatten())


def test_a_loop_that_weights_by_samples_is_not_equivalent_where_tokens_count() -> None:
    def by(counted: Callable[[Any], Any], model: Any, optimizer: Any, batches: Any) -> None:
        every = list(batches)
        total = sum(counted(batch) for batch in every)
        for batch in every:
            (token_mean(model, batch) * (counted(batch) / total)).backward()
        optimizer.step()

    torch.manual_seed(0)
    batch = torch.randn(8, 5, 6), torch.randint(3, (8, 5))
    samples = partial(by, lambda batch: len(batch[0]))
    tokens = partial(by, lambda batch: (batch[1] != -100).sum())
    options = {"loss": token_mean, "micro_batch": 4, "accumulation_steps": 2}
    result = check_equivalence(nn.Linear(6, 3), batch, window=samples, **options)
    assert not result.equivalent
    (culprit,) = result.culprits
    assert "for samples of equal counts alone" in culprit.finding
    assert check_equivalence(nn.Linear(6, 3), batch, window=tokens, **options).equivalent
