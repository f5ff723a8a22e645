"""Models that do something to the longest sample of a batch, on samples that are equally long."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence

from autobatch import check_equivalence
from autobatch.equivalence.result import Equivalence
from tests.equivalence.networks import EXACT, found

SIZE, STEPS = 16, 6
X = torch.randn(SIZE, STEPS, 3, generator=torch.Generator().manual_seed(5))
IDS = torch.randint(1, 9, (SIZE, STEPS), generator=torch.Generator().manual_seed(6))
Y = torch.arange(SIZE) % 3
FULL, FOUR = torch.full((SIZE,), STEPS), torch.full((SIZE,), 4)


def mask_of(lengths: Tensor, side: str = "right") -> Tensor:
    mask = torch.arange(STEPS)[None] < lengths[:, None]
    return mask if side == "right" else mask.flip(1)


class Model(nn.Module):
    """Calls a function with a layer of its own, so that a test can say what a model does."""

    def __init__(self, run: Callable[..., Tensor], layer: nn.Module | None = None) -> None:
        super().__init__()
        self.run, self.layer = run, layer or nn.Linear(3, 3)

    def forward(self, *inputs: Any) -> Tensor:
        return self.run(self.layer, *inputs)


def checked(run: Callable[..., Tensor], inputs: Any, layer: nn.Module | None = None) -> Equivalence:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        inputs, y = batch
        return F.cross_entropy(model(*inputs), y)

    torch.manual_seed(0)
    return check_equivalence(Model(run, layer), (inputs, Y), loss=loss)


def mean_of_longest(layer: nn.Module, x: Tensor, lengths: Tensor) -> Tensor:
    return layer(x[:, : int(torch.as_tensor(lengths).max())]).tanh().mean(1)


def mean_by_mask(layer: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    return mean_of_longest(layer, x, mask.sum(1))


def mean_by_padding(layer: nn.Module, x: Tensor, padding: Tensor) -> Tensor:
    return mean_by_mask(layer, x, ~padding)


def mean_of_last(layer: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    return layer(x[:, -int(mask.sum(1).max()) :]).tanh().mean(1)


def divided_by_longest(layer: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    weights = mask.to(x.dtype)
    return (layer(x).tanh() * weights[..., None]).sum(1) / weights.sum(1).max()


def mean_by_ids(layer: nn.Module, ids: Tensor) -> Tensor:
    return mean_by_mask(layer, F.one_hot(ids % 3, 3).to(torch.get_default_dtype()), ids != 0)


def mean_of_padded(layer: nn.Module, items: list[Tensor]) -> Tensor:
    return layer(pad_sequence(items, batch_first=True)).tanh().mean(1)


WRONG: dict[str, tuple[Callable[..., Tensor], Any]] = {
    "lengths": (mean_of_longest, (X, FOUR)),
    "lengths of all entries": (mean_of_longest, (X, FULL)),
    "lengths in a column": (lambda m, x, n: mean_of_longest(m, x, n[:, 0]), (X, FOUR[:, None])),
    "lengths in a list": (mean_of_longest, (X, [4] * SIZE)),
    "a mask of integers": (mean_by_mask, (X, mask_of(FOUR).long())),
    "a mask of bools": (mean_by_mask, (X, mask_of(FULL))),
    "a mask with more dimensions": (
        lambda m, x, mask: mean_by_mask(m, x, mask[:, 0, 0]),
        (X, mask_of(FULL)[:, None, None]),
    ),
    "a mask of padding": (mean_by_padding, (X, ~mask_of(FOUR))),
    "a mask of padding without any": (mean_by_padding, (X, ~mask_of(FULL))),
    "padding that comes first": (mean_of_last, (X, mask_of(FOUR, "left").long())),
    "padding that may come first": (mean_of_last, (X, mask_of(FULL).long())),
    "a divisor": (divided_by_longest, (X, mask_of(FULL).double())),
    "ids of padding": (mean_by_ids, (IDS,)),
    "sequences in a list": (mean_of_padded, (list(X),)),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_model_that_does_something_to_the_longest_sample_is_found(name: str) -> None:
    run, inputs = WRONG[name]
    result = checked(run, inputs)
    assert result.equivalent is False, str(result)
    assert result.difference < EXACT
    assert found(result) == [("layer", (f"batch[0][{len(inputs) - 1}]",))]
    assert "equal for this sample" in str(result)


def test_a_loss_that_cuts_what_it_gives_to_the_model_is_found() -> None:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        x = batch["x"][:, : int(batch["mask"].sum(1).max())]
        return F.cross_entropy(model(x).tanh().mean(1), batch["y"])

    batch = {"x": X, "mask": mask_of(FULL).long(), "y": Y}
    result = check_equivalence(nn.Linear(3, 3), batch, loss=loss)
    assert found(result) == [("layer", ('batch["mask"]',))]


def test_a_dropout_does_not_hide_it() -> None:
    layer = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.3))
    result = checked(mean_by_mask, (X, mask_of(FULL)), layer)
    assert result.equivalent is False, str(result)


def masked_mean(layer: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    mask = mask[:, : int(mask.sum(1).max())].to(x.dtype)
    out = layer(x[:, : mask.shape[1]]).tanh()
    return (out * mask[..., None]).sum(1) / mask.sum(1)[:, None]


def masked_mean_of_last(layer: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    longest = int(mask.sum(1).max())
    return masked_mean(layer, x[:, -longest:], mask[:, -longest:])


def masked_and_cut(layer: nn.Module, x: Tensor, mask: Tensor, lengths: Tensor) -> Tensor:
    longest = int(lengths.max())
    return masked_mean(layer, x[:, :longest], mask[:, :longest])


def cut_by_ids(layer: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    longest = int((ids != 0).sum(1).max())
    x = F.one_hot(ids % 3, 3).to(torch.get_default_dtype())
    return masked_mean(layer, x[:, :longest], mask[:, :longest])


def attention(layer: nn.Module, x: Tensor, padding: Tensor) -> Tensor:
    longest = int((~padding).sum(1).max())
    out = layer[0](layer[1](x[:, :longest]), src_key_padding_mask=padding[:, :longest])
    return masked_mean(layer[2], out, ~padding)


def packed(layer: nn.Module, x: Tensor, lengths: Tensor) -> Tensor:
    rows = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    out, _ = pad_packed_sequence(layer[0](rows)[0], batch_first=True)
    return layer[1](out[torch.arange(len(x)), lengths - 1])


def last_state(layer: nn.Module, items: list[Tensor]) -> Tensor:
    return torch.stack([layer(item).tanh().mean(0) for item in items])


def two_layers() -> nn.Module:
    encoder = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.2, batch_first=True)
    return nn.ModuleList([encoder, nn.Linear(3, 4), nn.Linear(4, 3)])


def recurrent() -> nn.Module:
    return nn.ModuleList([nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 3)])


RIGHT: dict[str, tuple[Callable[..., Tensor], Any, Callable[[], nn.Module] | None]] = {
    "a masked mean": (masked_mean, (X, mask_of(FULL)), None),
    "a masked mean of four": (masked_mean, (X, mask_of(FOUR).long()), None),
    "a masked mean with dropout": (
        masked_mean,
        (X, mask_of(FULL)),
        lambda: nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.3)),
    ),
    "a masked mean of the last": (masked_mean_of_last, (X, mask_of(FOUR, "left")), None),
    "a mask and lengths that agree": (masked_and_cut, (X, mask_of(FOUR), FOUR), None),
    "ids and a mask that agree": (cut_by_ids, (IDS, mask_of(FULL)), None),
    "attention": (attention, (X, ~mask_of(FULL)), two_layers),
    "attention over four": (attention, (X, ~mask_of(FOUR)), two_layers),
    "a packed LSTM": (packed, (X, FULL), recurrent),
    "a packed LSTM over four": (packed, (X, FOUR), recurrent),
    "sequences one by one": (last_state, (list(X),), None),
}


@pytest.mark.parametrize("name", RIGHT)
def test_a_model_that_treats_each_sample_by_its_own_length_is_equivalent(name: str) -> None:
    run, inputs, layer = RIGHT[name]
    result = checked(run, inputs, layer() if layer else None)
    assert result.equivalent, str(result)


def test_where_padding_may_be_on_either_side_nothing_is_decided() -> None:
    result = checked(masked_mean_of_last, (X, mask_of(FULL)))
    assert result.equivalent is None
    assert found(result) == [("undecided", ("batch[0][1]",))]
    assert str(result).startswith("undecided: equal for this sample")


def test_random_numbers_that_depend_on_the_longest_leave_it_undecided() -> None:
    def noisy(layer: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
        x = x[:, : int(mask.sum(1).max())]
        return layer(x + 0.1 * torch.randn_like(x)).tanh().mean(1)

    result = checked(noisy, (X, mask_of(FULL)))
    assert result.equivalent is None
    assert "undecided" in [culprit.kind for culprit in result.culprits]


def test_lengths_that_the_model_refuses_are_said() -> None:
    def strict(layer: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
        if not bool(mask.all()):
            raise ValueError("no padding")
        return layer(x).mean(1)

    result = checked(strict, (X, mask_of(FULL)))
    assert result.equivalent
    assert any("batch[0][1] could not be made shorter" in note for note in result.notes)
    assert any("no padding" in note for note in result.notes)


def test_the_batch_that_was_given_keeps_its_lengths() -> None:
    mask, lengths = mask_of(FOUR), [4] * SIZE
    checked(lambda m, x, mask, n: mean_by_mask(m, x, mask), (X, mask, lengths))
    assert torch.equal(mask, mask_of(FOUR)) and lengths == [4] * SIZE
