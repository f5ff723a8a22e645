"""Losses that divide by a count, on samples that all have the same count."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autobatch import check_equivalence
from autobatch.equivalence.experiment import Experiment
from tests.equivalence.networks import EXACT, found, kinds, mean_square, network, samples

X, Y = samples()
WORDS = torch.randint(1, 11, (16, 7), generator=torch.Generator().manual_seed(4))


def line() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 11))


def masked(model: nn.Module, batch: Any) -> Tensor:
    return (model(batch["x"]) * batch["mask"]).square().sum() / batch["mask"].sum()


def selected(model: nn.Module, batch: Any) -> Tensor:
    return model(batch["x"])[batch["mask"]].square().mean()


def of_lengths(model: nn.Module, batch: Any) -> Tensor:
    lengths = torch.as_tensor(batch["lengths"])
    mask = torch.arange(3)[None] < lengths[:, None]
    return (model(batch["x"]).square() * mask).sum() / mask.sum()


def of_tokens(ignored: int) -> Callable[[nn.Module, Any], Tensor]:
    return lambda model, batch: F.cross_entropy(
        model(batch["x"]).flatten(0, 1), batch["y"].flatten(), ignore_index=ignored
    )


def of_classes(model: nn.Module, batch: Any) -> Tensor:
    outputs = model(batch["x"])
    return F.cross_entropy(outputs, batch["y"], weight=torch.tensor([0.1, 1, 5]).to(outputs.dtype))


def of_boxes(model: nn.Module, batch: Any) -> Tensor:
    outputs = model(batch[0][:, 0])
    apart = [
        (out - t["boxes"].to(out)).abs().sum() for out, t in zip(outputs, batch[1], strict=True)
    ]
    return torch.stack(apart).sum() / sum(len(t["boxes"]) for t in batch[1])


def of_flat_boxes(model: nn.Module, batch: Any) -> Tensor:
    owners = batch["batch_idx"].long()
    return (model(batch["x"])[owners] - batch["boxes"]).abs().sum() / len(owners)


def of_positives(model: nn.Module, batch: Any) -> Tensor:
    counted = batch["y"] > 0
    return (model(batch["x"]).square().mean(1) * counted).sum() / counted.sum()


def of_two(model: nn.Module, batch: Any) -> Tensor:
    return model(batch["x"]).square().mean() + masked(model, batch)


BOXES = [
    {"boxes": torch.randn(2, 3, generator=torch.Generator().manual_seed(i))} for i in range(16)
]
HIDDEN: dict[str, tuple[Callable[[], nn.Module], Any, Any, str]] = {
    "a mask of floats": (network, masked, {"x": X, "mask": torch.ones(16, 3)}, "mask"),
    "a mask of integers": (network, masked, {"x": X, "mask": torch.ones(16, 3).long()}, "mask"),
    "a mask of bools": (network, selected, {"x": X, "mask": torch.ones(16, 3).bool()}, "mask"),
    "weights of samples": (network, masked, {"x": X, "mask": torch.full((16, 1), 0.5)}, "mask"),
    "lengths": (network, of_lengths, {"x": X, "lengths": torch.full((16,), 3)}, "lengths"),
    "lengths in a list": (network, of_lengths, {"x": X, "lengths": [3] * 16}, "lengths"),
    "tokens": (line, of_tokens(-100), {"x": WORDS, "y": WORDS}, "y"),
    "tokens and another ignored index": (line, of_tokens(7), {"x": WORDS % 7, "y": WORDS % 7}, "y"),
    "class weights and one class": (
        network,
        of_classes,
        {"x": X, "y": torch.zeros(16).long()},
        "y",
    ),
    "positives": (network, of_positives, {"x": X, "y": torch.ones(16).long()}, "y"),
    "boxes in a list": (network, of_boxes, (X[:, None], BOXES), "1"),
    "flat boxes": (
        network,
        of_flat_boxes,
        {"x": X, "batch_idx": torch.arange(32) // 2, "boxes": torch.randn(32, 3)},
        "batch_idx",
    ),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_a_count_that_is_the_same_in_all_samples_is_found(name: str) -> None:
    make, loss, batch, part = HIDDEN[name]
    result = check_equivalence(make(), batch, loss=loss)
    assert not result.equivalent
    assert result.difference < EXACT
    assert kinds(result) == ["weight"]
    assert part in " ".join((result.culprits[0].finding, *result.culprits[0].where))
    assert "equal for this sample" in str(result)


def test_the_weight_that_is_named_holds_for_unequal_counts() -> None:
    batch = {"x": X, "mask": (torch.arange(3)[None] < torch.arange(16)[:, None] % 3 + 1).float()}

    def count(part: Any) -> float:
        return float(part["mask"].sum())

    assert not check_equivalence(network(), batch, loss=masked).equivalent
    assert check_equivalence(network(), batch, loss=masked, weight=count).equivalent
    assert check_equivalence(
        network(), {"x": X, "mask": torch.ones(16, 3)}, loss=masked, weight=count
    ).equivalent


def test_two_terms_with_two_counts_have_no_weight() -> None:
    result = check_equivalence(network(), {"x": X, "mask": torch.ones(16, 3)}, loss=of_two)
    assert not result.equivalent
    assert kinds(result) == ["loss"]


def test_an_ignored_label_where_each_sample_has_one_is_a_note() -> None:
    result = check_equivalence(
        network(), (X, torch.arange(16) % 3), loss=lambda m, b: F.cross_entropy(m(b[0]), b[1])
    )
    assert result.equivalent
    assert "pass weight=lambda batch: (batch[1] != -100).sum()" in result.notes[-1]


def test_the_batch_that_was_given_is_not_varied() -> None:
    batch = {"x": X, "lengths": [3] * 16, "mask": torch.ones(16, 3)}
    check_equivalence(network(), batch, loss=of_lengths)
    assert batch["lengths"] == [3] * 16 and bool((batch["mask"] == 1).all())


def test_lists_of_images_and_targets_are_checked() -> None:
    def per_image(model: nn.Module, batch: Any) -> Tensor:
        images, targets = batch
        outputs = [model(image.mean((1, 2)).repeat(2)) for image in images]
        losses = [
            (out - t["boxes"].to(out)).abs().sum() / max(len(t["boxes"]), 1)
            for out, t in zip(outputs, targets, strict=True)
        ]
        return torch.stack(losses).sum() / len(images)

    images = [torch.randn(3, 4 + i % 2, 5) for i in range(16)]
    targets = [{"boxes": torch.randn(i % 3 + 1, 3)} for i in range(16)]
    result = check_equivalence(network(), (images, targets), loss=per_image)
    assert result.equivalent, str(result)


def test_a_loss_that_looks_into_the_model_is_varied_by_whole_gradients() -> None:
    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            self.kept = self.layer(x)
            return self.kept

    def loss(model: nn.Module, batch: Any) -> Tensor:
        model(batch["x"])
        return (model.kept * batch["mask"]).square().sum() / batch["mask"].sum()

    result = check_equivalence(Keeps(), {"x": X, "mask": torch.ones(16, 3)}, loss=loss)
    assert found(result) == [("weight", ('batch["mask"].sum()',))]
    assert check_equivalence(network(), (X, Y), loss=mean_square).equivalent


def kept(model: nn.Module, batch: Any, counted: Tensor) -> Tensor:
    return (model(batch["x"]) - batch["y"])[counted].square().mean()


NAN, FAR = Y.clone(), Y.clone()
NAN[0, :2], FAR[0, :2] = float("nan"), -999.0
DEPTH = Y.abs() + 0.1
CONDITIONS: dict[str, tuple[Callable[[Tensor], Tensor], tuple[Tensor, ...], str]] = {
    "not itself": (lambda y: y == y, (Y, NAN), '(~batch["y"].isnan()).sum()'),
    "isnan": (lambda y: ~y.isnan(), (Y, NAN), '(~batch["y"].isnan()).sum()'),
    "near a number": (
        lambda y: ~torch.isclose(y, torch.tensor(-999.0, dtype=y.dtype)),
        (Y, FAR),
        '(batch["y"] != -999).sum()',
    ),
    "one of some": (
        lambda y: ~torch.isin(y, torch.tensor([-999.0], dtype=y.dtype)),
        (Y, FAR),
        '(batch["y"] != -999).sum()',
    ),
    "a bound": (lambda y: y > -100, (Y, FAR), '(batch["y"] > -100).sum()'),
    "not below a bound": (lambda y: ~(y <= -100), (Y, FAR), '(batch["y"] > -100).sum()'),
    "two bounds": (
        lambda y: (y > 1e-3) & (y < 80),
        (DEPTH, DEPTH * (torch.arange(16) % 3 > 0)[:, None]),
        '((batch["y"] < 80) & (batch["y"] > 0.001)).sum()',
    ),
}


@pytest.mark.parametrize("name", CONDITIONS)
def test_the_condition_of_a_mask_is_the_weight_whether_counts_are_equal_or_not(name: str) -> None:
    counted, targets, weight = CONDITIONS[name]
    for y in targets:
        result = check_equivalence(
            network(), {"x": X, "y": y}, loss=lambda m, b: kept(m, b, counted(b["y"]))
        )
        assert found(result) == [("weight", (weight,))]


def test_a_weight_that_fits_one_batch_by_chance_is_not_named() -> None:
    def far(model: nn.Module, batch: Any) -> Tensor:
        return kept(model, batch, batch["y"].abs().sqrt() > 0.5)

    y = torch.ones(16, 3)
    y[0, :2] = 0  # as many entries are not zero as count here, but not in other batches
    for targets in (y, torch.ones(16, 3)):
        result = check_equivalence(network(), {"x": X, "y": targets}, loss=far)
        assert kinds(result) == ["weight"]
        assert "is not known" in result.culprits[0].finding
        assert "!= 0" not in str(result)


LISTS: dict[str, tuple[list[Any], Callable[[list[Any]], Tensor], str]] = {
    "None": (
        [1.0] * 16,
        lambda items: torch.tensor([item is not None for item in items]),
        'sum(item is not None for item in batch["t"])',
    ),
    "numbers": ([0.5] * 16, torch.tensor, 'sum(batch["t"])'),
    "bools": ([True] * 16, torch.tensor, 'sum(batch["t"])'),
    "texts": (
        ["four"] * 16,
        lambda items: torch.tensor([len(item) for item in items]),
        'sum(map(len, batch["t"]))',
    ),
}


@pytest.mark.parametrize("name", LISTS)
def test_what_items_of_a_list_count_is_found(name: str) -> None:
    items, count, weight = LISTS[name]

    def loss(model: nn.Module, batch: Any) -> Tensor:
        weights = count(batch["t"]).double()
        return (model(batch["x"]).square().mean(1) * weights).sum() / weights.sum()

    result = check_equivalence(network(), {"x": X, "t": items}, loss=loss)
    assert found(result) == [("weight", (weight,))]


def test_a_choice_among_the_batch_is_found_where_it_agrees_by_chance() -> None:
    def upper_half(model: nn.Module, batch: Any) -> Tensor:
        each = (model(batch[0]) - batch[1]).square()[:, 0]
        return (each * (each.detach() > each.detach().quantile(0.5))).mean()

    torch.manual_seed(0)
    x, y = torch.randn(8, 5), torch.randn(8, 1)
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1))
    result = check_equivalence(model, (x, y), loss=upper_half)
    assert result.difference < EXACT
    assert found(result) == [("loss", ("the loss",))]


def test_a_variation_that_the_loss_refuses_is_left_out_and_said() -> None:
    def strict(model: nn.Module, batch: Any) -> Tensor:
        if not bool((batch["n"] == 3).all()):
            raise ValueError("three are needed")
        return model(batch["x"]).square().mean()

    result = check_equivalence(network(), {"x": X, "n": torch.full((16,), 3)}, loss=strict)
    assert result.equivalent
    assert any('batch["n"] could not be varied' in note for note in result.notes)
    assert any("three are needed" in note for note in result.notes)


@pytest.mark.parametrize("where", ["outputs", "forward"])
def test_an_experiment_of_the_check_that_fails_is_not_blamed_on_the_model(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no such experiment")

    monkeypatch.setattr(Experiment, where, fail)
    assert check_equivalence(network(), (X, Y), loss=mean_square).equivalent
    result = check_equivalence(network(nn.BatchNorm1d(8)), (X, Y), loss=mean_square)
    assert result.equivalent is False


@pytest.mark.parametrize("seed", range(20))
def test_a_part_that_the_loss_does_not_read_is_no_weight(seed: int) -> None:
    torch.manual_seed(seed)
    batch = {
        "cat": torch.randint(0, 3, (8,)),
        "x": torch.randn(8, 6),
        "y": torch.randint(1, 3, (8,)),
    }

    def by_positives(model: nn.Module, batch: Any) -> Tensor:
        losses = F.cross_entropy(model(batch["x"]), batch["y"], reduction="sum")
        return losses / (batch["y"] > 0).sum().clamp(min=1)

    (culprit,) = check_equivalence(nn.Linear(6, 3), batch, loss=by_positives).culprits
    assert culprit.where == ('(batch["y"] > 0).sum()',)
