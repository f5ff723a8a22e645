"""Loaders that fill the same memory anew, of which a window draws several batches ahead."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from autobatch import windows

SAMPLES, FEATURES = 24, 5


def data() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(SAMPLES, FEATURES, dtype=torch.float64, generator=generator)


def network() -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(FEATURES, 1).double()


def one_tensor() -> Iterator[Tensor]:
    buffer = torch.empty(2, FEATURES, dtype=torch.float64)
    for rows in data().split(2):
        yield buffer.copy_(rows)


def one_dict() -> Iterator[dict[str, Any]]:
    batch: dict[str, Any] = {}
    for rows in data().split(2):
        batch["x"] = rows
        yield batch


def views_of_one_tensor() -> Iterator[list[Tensor]]:
    buffer = torch.empty(4, FEATURES, dtype=torch.float64)
    for rows in data().split(2):
        yield [buffer[: len(rows)].copy_(rows)]


def ring_of_arrays(slots: int = 2) -> Iterator[Tensor]:
    """Writes through NumPy, which no version of a tensor tells."""
    ring = [np.empty((2, FEATURES)) for _ in range(slots)]
    for at, rows in enumerate(data().split(2)):
        ring[at % slots][:] = rows.numpy()
        yield torch.from_numpy(ring[at % slots])


def filled_ahead() -> Iterator[Tensor]:
    """Gives up the slot of a batch when the next one is asked for, as prefetching loaders do."""
    ring, batches = [np.empty((2, FEATURES)) for _ in range(5)], data().split(2)
    for at in range(len(batches) + 4):
        if at < len(batches):
            ring[at % 5][:] = batches[at].numpy()
        if at >= 4:
            yield torch.from_numpy(ring[(at - 4) % 5])


def rows_of(batch: Any) -> Tensor:
    rows: Any = batch["x"] if isinstance(batch, dict) else batch
    found: Tensor = rows[0] if isinstance(rows, list) else rows
    return found


def trained(loader: Any, micro_batch: int, steps: int) -> Tensor:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for window in windows(loader, optimizer, micro_batch=micro_batch, accumulation_steps=steps):
        window.run(lambda batch: model(rows_of(batch)).square().mean())
        window.step()
    return model.weight.detach()


@pytest.mark.parametrize(("micro_batch", "steps"), [(2, 2), (2, 4), (1, 4), (3, 2), (2, 3)])
@pytest.mark.parametrize(
    "loader", [one_tensor, one_dict, views_of_one_tensor, ring_of_arrays, filled_ahead]
)
def test_a_loader_that_fills_the_same_memory_anew_trains_as_one_of_whole_batches(
    loader: Callable[[], Iterator[Any]], micro_batch: int, steps: int
) -> None:
    expected = trained([*data().split(micro_batch * steps)], micro_batch, steps)
    torch.testing.assert_close(trained(loader(), micro_batch, steps), expected)


def test_memory_that_is_filled_anew_in_later_larger_windows_is_noticed() -> None:
    """Batches of one sample: more of them than slots are drawn when they have come."""

    def batches() -> Iterator[Tensor]:
        ring = [np.empty((4, FEATURES)) for _ in range(3)]
        start = 0
        for at, size in enumerate((4, 4, *(1,) * 8, *(2,) * 4)):
            slot = ring[at % 3][:size]
            slot[:] = data()[start : start + size].numpy()
            start += size
            yield torch.from_numpy(slot)

    torch.testing.assert_close(trained(batches(), 4, 2), trained([*data().split(8)], 4, 2))


def given_out(loader: Any) -> list[list[Any]]:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    out: list[list[Any]] = []
    for window in windows(loader, optimizer, micro_batch=2, accumulation_steps=2):
        out.append([])
        for batch in window:
            out[-1].append(batch)
            window.backward(model(rows_of(batch)).square().mean())
        window.step()
    return out


@pytest.mark.parametrize("is_listed", [False, True], ids=["iterator", "list"])
def test_batches_in_memory_of_their_own_are_not_copied_but_once_to_learn_that(
    is_listed: bool,
) -> None:
    batches = [*data().split(2)]
    out = given_out(batches if is_listed else iter(batches))
    copied = [batch is not given for batch, given in zip(chain(*out), batches, strict=True)]
    assert copied == [not is_listed, *[False] * 11]


def test_nothing_that_dataloader_stacks_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autobatch.accumulate.reused._copy", pytest.fail)
    assert len(given_out(DataLoader(TensorDataset(data()), batch_size=2))) == 6


def test_what_all_batches_share_and_nobody_writes_to_is_not_copied_for_ever() -> None:
    mask = torch.tensor(2.0)
    out = given_out({"x": rows, "mask": mask} for rows in data().split(2))
    assert [window[0]["mask"] is mask for window in out] == [False] * 3 + [True] * 3


def test_a_loop_that_writes_to_its_batches_does_not_make_the_loader_one_that_does() -> None:
    batches = [*data().split(2)]
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = windows(iter(batches), optimizer, micro_batch=2, accumulation_steps=2)
    for number, window in enumerate(run):
        for at, batch in enumerate(window):
            assert number == 0 or batch is batches[2 * number + at]
            batch.mul_(2)
            window.backward(model(batch).square().mean())
        window.step()


def test_batches_without_values_to_compare_are_passed_on() -> None:
    """Tensors that take gradients stay the loader's own, too."""
    leaves = [rows.clone().requires_grad_() for rows in data().split(2)]
    names = [["a", "b"] for _ in leaves]
    out = given_out(
        {"x": x, "names": n, "own": object()} for x, n in zip(leaves, names, strict=True)
    )
    assert all(one["x"] is x for one, x in zip(chain(*out), leaves, strict=True))
    assert all(leaf.grad is not None for leaf in leaves)


def test_copies_of_tensors_keep_what_a_collate_function_gave_them() -> None:
    def batches() -> Iterator[Tensor]:
        for number, rows in enumerate(data().split(2)):
            rows.number = number  # type: ignore[attr-defined]
            yield rows

    out = given_out(batches())
    assert [batch.number for batch in chain(*out)] == list(range(SAMPLES // 2))
