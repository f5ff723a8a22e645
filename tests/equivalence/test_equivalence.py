"""Gradients of windows against those of whole batches: every planted difference is found, alone."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import autobatch
from autobatch import UsageError, Workload, WorkloadError, check_equivalence
from autobatch.cli import main
from autobatch.equivalence.result import Equivalence
from autobatch.records.codec import decode
from tests.support.plans import example_plan, ragged_plan

EXACT = 1e-12


def samples(number: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return (
        torch.randn(number, 6, generator=generator),
        torch.randn(number, 3, generator=generator),
    )


def sentences(lengths: list[int]) -> dict[str, Tensor]:
    """Return token ids and labels, of which only the first ones of each row count."""
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(0, 11, (len(lengths), 7), generator=generator)
    labels = torch.randint(0, 5, (len(lengths), 7), generator=generator)
    for row, length in zip(labels, lengths, strict=True):
        row[length:] = -100
    return {"input_ids": ids, "labels": labels}


RAGGED = [2, 7, 3, 1, 6, 6, 5, 4]


def mean_square(model: nn.Module, batch: Any) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


def contrastive(model: nn.Module, batch: Any) -> Tensor:
    one, other = F.normalize(model(batch[0]), dim=-1), F.normalize(batch[1], dim=-1)
    return F.cross_entropy(10 * one @ other.T, torch.arange(len(one)))


def similarities(embeddings: Tensor) -> Tensor:
    return 10 * F.normalize(embeddings, dim=-1) @ F.normalize(embeddings, dim=-1).T


def token_mean(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch["input_ids"]).flatten(0, 1), batch["labels"].flatten())


def network(*middle: nn.Module) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), *middle, nn.GELU(), nn.Linear(8, 3))


def tagger(*middle: nn.Module) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Embedding(11, 8), nn.GELU(), *middle, nn.Linear(8, 5))


class Residual(nn.Module):
    """As in ResNets, whose last gain is zero at first: so far nothing mixes."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
        nn.init.zeros_(self.branch[1].weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class Codebook(nn.Module):
    """Adds the nearest entry of a codebook, which follows the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("entries", torch.randn(5, 8, generator=torch.manual_seed(2)))

    def forward(self, x: Tensor) -> Tensor:
        nearest = torch.cdist(x.detach(), self.entries).argmin(1)
        chosen = self.entries[nearest]
        with torch.no_grad():
            self.entries = self.entries.index_add(0, nearest, 0.1 * (x - chosen))
        return x * chosen


class Centred(nn.Module):
    """Takes away the mean over the samples, and is no BatchNorm."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


class Experts(nn.Module):
    """Sends each sample to one of three layers, which serve the first two that come."""

    def __init__(self) -> None:
        super().__init__()
        self.choice = nn.Linear(8, 3)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        shares = self.choice(x).softmax(-1)
        result = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            served = (shares.argmax(-1) == index).nonzero().flatten()[:2]
            if len(served):
                answer = expert(x[served]) * shares[served, index : index + 1]
                result = result.index_add(0, served, answer)
        return result


class MixesItself(nn.Module):
    """Looks across samples in its own code, between layers that do not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return self.second(hidden * torch.sigmoid(hidden.mean(0)))


class DropPath(nn.Module):
    """Leaves out whole samples, by a draw in its own code."""

    def forward(self, x: Tensor) -> Tensor:
        return x * x.new_empty(len(x), 1).bernoulli_(0.6) / 0.6


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * torch.randn_like(x)


class LayerDrop(nn.Module):
    """Leaves out a layer by Python's random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x if random.random() < 0.5 else self.layer(x)


def found(result: Equivalence) -> list[tuple[str, tuple[str, ...]]]:
    return [(culprit.kind, culprit.where) for culprit in result.culprits]


CLEAN: dict[str, tuple[nn.Module, Any, Any]] = {
    "layer norm": (network(nn.LayerNorm(8)), samples(), mean_square),
    "group norm": (network(nn.GroupNorm(2, 8)), samples(), mean_square),
    "frozen batch norm": (network(nn.BatchNorm1d(8).eval()), samples(), mean_square),
    "a penalty in the loss": (
        network(),
        samples(),
        lambda model, batch: mean_square(model, batch) + model[0].weight.square().sum(),
    ),
    "recurrent": (
        nn.Sequential(nn.Embedding(11, 8), nn.LSTM(8, 5, batch_first=True)),
        sentences([7] * 8),
        lambda model, batch: model(batch["input_ids"])[0].square().mean(),
    ),
    "no loss given": (network(nn.LayerNorm(8)), samples()[0], None),
}


@pytest.mark.parametrize("name", CLEAN)
def test_a_clean_model_is_equivalent_to_rounding(name: str) -> None:
    model, sample, loss = CLEAN[name]
    result = check_equivalence(model, sample, loss=loss)
    assert result.equivalent
    assert result.culprits == ()
    assert result.difference < EXACT
    assert result.dtype == "float64"
    assert len({each.window for each in result.comparisons}) == 2
    assert any(len(set(each.window)) > 1 for each in result.comparisons)


PLANTED: dict[str, tuple[nn.Module, Any, Any, list[tuple[str, tuple[str, ...]]]]] = {
    "batch norm": (
        network(nn.BatchNorm1d(8)),
        samples(),
        mean_square,
        [("batchnorm", ("1",))],
    ),
    "two batch norms": (
        network(nn.BatchNorm1d(8), nn.Linear(8, 8), nn.BatchNorm1d(8)),
        samples(),
        mean_square,
        [("batchnorm", ("1", "3"))],
    ),
    "batch norm at the end of a residual branch that begins as zeros": (
        network(Residual()),
        samples(),
        mean_square,
        [("batchnorm", ("1.branch.1",))],
    ),
    "another layer across samples": (
        network(nn.ReLU(), Centred()),
        samples(),
        mean_square,
        [("layer", ("2",))],
    ),
    "code across samples between layers": (
        network(MixesItself()),
        samples(),
        mean_square,
        [("layer", ("1",))],
    ),
    "experts of limited capacity": (
        network(Experts()),
        samples(),
        mean_square,
        [("layer", ("1",))],
    ),
    "in-batch negatives": (network(), samples(), contrastive, [("loss", ("the loss",))]),
    "the root of a mean": (
        network(),
        samples(),
        lambda model, batch: mean_square(model, batch).sqrt(),
        [("loss", ("the loss",))],
    ),
    "in-batch negatives of tokens": (
        tagger(),
        sentences([7] * 8),
        lambda model, batch: F.cross_entropy(
            similarities(model(batch["input_ids"]).mean(1)), torch.arange(len(batch["labels"]))
        ),
        [("loss", ("the loss",))],
    ),
    "ragged tokens": (
        tagger(),
        sentences(RAGGED),
        token_mean,
        [("weight", ('(batch["labels"] != -100).sum()',))],
    ),
    "ragged tokens, shifted": (
        tagger(),
        sentences(RAGGED),
        lambda model, batch: F.cross_entropy(
            model(batch["input_ids"])[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
        ),
        [("weight", ('(batch["labels"][:, 1:] != -100).sum()',))],
    ),
    "a sum": (
        network(),
        samples(),
        lambda model, batch: (model(batch[0]) - batch[1]).square().sum(),
        [("weight", ("the loss",))],
    ),
    "spectral norm": (
        network(nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8))),
        samples(),
        mean_square,
        [("state", ("1.parametrizations.weight.0",))],
    ),
    "a codebook": (network(Codebook()), samples(), mean_square, [("state", ("1",))]),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_difference_is_found_and_nothing_else(name: str) -> None:
    model, sample, loss, expected = PLANTED[name]
    result = check_equivalence(model, sample, loss=loss)
    assert not result.equivalent
    assert found(result) == expected
    assert all(culprit.difference > result.tolerance for culprit in result.culprits)
    assert expected[0][1][0] in str(result)


@pytest.mark.parametrize(
    "module",
    [nn.Dropout(0.4), DropPath(), Noise(), nn.RReLU(), LayerDrop()],
    ids=lambda module: type(module).__name__,
)
def test_random_draws_are_named_and_do_not_spoil_the_verdict(module: nn.Module) -> None:
    result = check_equivalence(network(module), samples(), loss=mean_square)
    assert found(result) == [("random", ("1",))]
    assert result.equivalent
    assert result.difference > 1e-3
    assert result.held_difference < EXACT
    assert "random numbers" in str(result)


def test_dropout_hides_nothing_else() -> None:
    model = network(nn.BatchNorm1d(8), nn.Dropout(0.4))
    result = check_equivalence(model, samples(), loss=contrastive)
    assert found(result) == [
        ("random", ("2",)),
        ("batchnorm", ("1",)),
        ("loss", ("the loss",)),
    ]
    assert not result.equivalent


def test_the_weight_that_is_named_makes_it_exact() -> None:
    result = check_equivalence(
        tagger(),
        sentences(RAGGED),
        loss=token_mean,
        weight=lambda batch: int((batch["labels"] != -100).sum()),
    )
    assert result.equivalent
    assert result.difference < EXACT


def test_weights_that_count_nothing_in_the_batch_are_measured() -> None:
    result = check_equivalence(
        network(),
        samples(),
        loss=lambda model, batch: mean_square(model, batch) * len(batch[0]) ** 0.3,
    )
    assert found(result) == [("weight", ("the loss",))]
    assert "nothing that was counted" in result.culprits[0].finding


def test_what_no_experiment_explains_is_said_to_be_unexplained() -> None:
    def by_position(model: nn.Module, batch: Any) -> Tensor:
        each = (model(batch[0]) - batch[1]).square().mean(1)
        return (each * torch.linspace(0, 1, len(each))).mean()

    result = check_equivalence(network(), samples(), loss=by_position)
    assert found(result) == [("unexplained", ())]
    assert not result.equivalent


@settings(max_examples=6, deadline=None)
@given(st.integers(1, 5), st.integers(1, 4), st.lists(st.integers(1, 7), min_size=20, max_size=20))
def test_any_window_of_any_lengths_is_exact_by_its_tokens(
    micro_batch: int, steps: int, lengths: list[int]
) -> None:
    result = check_equivalence(
        tagger(),
        sentences(lengths),
        loss=token_mean,
        weight=lambda batch: int((batch["labels"] != -100).sum()),
        micro_batch=micro_batch,
        accumulation_steps=steps,
    )
    assert result.difference < EXACT


def test_parts_that_models_cast_to_float32_stay_exact() -> None:
    class Norm(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            wide = x.to(torch.float32)
            return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)

    result = check_equivalence(network(Norm()).bfloat16(), samples(), loss=mean_square)
    assert result.difference < EXACT


def test_mixed_precision_differs_by_its_rounding_only() -> None:
    mixed = check_equivalence(network(), samples(), loss=mean_square, autocast="bf16")
    assert mixed.equivalent
    assert mixed.dtype == "float64"
    assert mixed.difference < EXACT
    assert mixed.rounding is not None and 1e-6 < mixed.rounding < 5e-2
    assert "in mixed precision" in str(mixed)


def test_nothing_of_the_users_is_changed() -> None:
    model = network(nn.BatchNorm1d(8), nn.Dropout(0.4))
    model[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(7)
    random.seed(7)
    expected = torch.rand(3), random.random()
    torch.manual_seed(7)
    random.seed(7)
    check_equivalence(model, samples(), loss=mean_square)
    assert torch.equal(torch.rand(3), expected[0])
    assert random.random() == expected[1]
    assert torch.get_default_dtype() is torch.float32
    assert [module.training for module in model] == [True, False, True, True, True]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_model_on_meta_gets_random_weights() -> None:
    with torch.device("meta"):
        model = network(nn.BatchNorm1d(8))
    result = check_equivalence(model, samples(), loss=mean_square)
    assert found(result) == [("batchnorm", ("1",))]


def test_a_plan_is_scaled_down_and_says_so() -> None:
    plan = ragged_plan(64, ((16,) * 4,))
    result = check_equivalence(network(), samples(), plan, loss=mean_square)
    assert result.comparisons[0].window == (4, 4, 4, 4)
    assert any("4 micro-batches of up to 16 are planned" in note for note in result.notes)
    ragged = check_equivalence(network(), samples(), ragged_plan(5, ((3, 2),)), loss=mean_square)
    assert [each.window for each in ragged.comparisons] == [(3, 2)]


def test_a_small_sample_still_shows_batch_norm() -> None:
    few = tuple(tensor[:4] for tensor in samples())
    plan = ragged_plan(64, ((4,) * 16,))
    result = check_equivalence(network(nn.BatchNorm1d(8)), few, plan, loss=mean_square)
    assert ("batchnorm", ("1",)) in found(result)
    assert any("4 different rows" in note for note in result.notes)


def test_items_of_a_data_set_differ() -> None:
    data = torch.utils.data.TensorDataset(*sentences(RAGGED).values())

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return token_mean(model, {"input_ids": batch[0], "labels": batch[1]})

    for sample in (data, torch.utils.data.DataLoader(data, batch_size=2, shuffle=True)):
        result = check_equivalence(tagger(), sample, loss=loss)
        assert found(result) == [("weight", ("(batch[1] != -100).sum()",))]
        assert result.notes == ()


def test_samples_may_lie_in_another_dimension() -> None:
    def build(n: int) -> Tensor:
        return torch.randn(5, n, 6, generator=torch.Generator().manual_seed(n))

    workload = Workload(model=network(), batch=build, loss=lambda m, x: m(x).square().mean())
    result = check_equivalence(workload)
    assert result.equivalent
    assert result.difference < EXACT


def test_what_cannot_be_checked_is_refused_in_one_line() -> None:
    plan = example_plan()
    window = Workload(model=network(), batch=lambda n: samples(n), window=lambda m, o, b: None)
    frozen = network().requires_grad_(False)
    for ask, error, words in [
        (lambda: check_equivalence(network(), samples(), plan, micro_batch=2), UsageError, "both"),
        (lambda: check_equivalence(network(), samples(), micro_batch=0), UsageError, "at least 1"),
        (lambda: check_equivalence(window), WorkloadError, "made no step"),
        (lambda: check_equivalence(window, weight=len), UsageError, "or a weight"),
        (
            lambda: check_equivalence(network(), samples(), loss=mean_square, dtype=torch.int8),
            UsageError,
            "float64",
        ),
        (
            lambda: check_equivalence(network(), samples(), loss=mean_square, weight=lambda b: 0),
            UsageError,
            "at least 0",
        ),
        (
            lambda: check_equivalence(frozen, samples(), loss=mean_square),
            WorkloadError,
            "no gradient",
        ),
        (
            lambda: check_equivalence(network(), samples(), loss=lambda m, b: 0 * m(b[0]).sum()),
            WorkloadError,
            "nothing to compare",
        ),
        (
            lambda: check_equivalence(network(), samples(), loss=lambda m, b: m(b[1]).sum()),
            WorkloadError,
            "failed at micro-batch",
        ),
    ]:
        with pytest.raises(error, match=words) as caught:
            ask()
        assert "\n" not in str(caught.value)


def test_a_model_that_runs_in_single_precision_only_is_compared_in_that() -> None:
    class Single(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            if x.dtype != torch.float32:
                raise TypeError("single precision only")
            return self.layer(x)

    result = check_equivalence(Single(), samples(), loss=mean_square)
    assert result.equivalent
    assert result.dtype == "float32"
    assert "single precision only" in result.notes[0]


def test_the_result_is_a_record_that_reads_and_saves() -> None:
    result = check_equivalence(network(nn.BatchNorm1d(8)), samples(), loss=mean_square)
    document = json.loads(result.to_json())
    assert document.pop("schema_version") == 2
    assert document.pop("difference") == result.difference
    assert decode(Equivalence, document) == result
    text = str(result)
    assert text.startswith("not equivalent")
    assert "GroupNorm" in text and "Culprit: BatchNorm" in text
    assert isinstance(result, autobatch.Equivalence)


SPEC = """
import torch
from torch import nn

def clean():
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3))

def mixing():
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Linear(8, 3))
"""


@pytest.mark.slow
def test_the_command_answers_by_its_exit_code(tmp_path, capsys) -> None:
    path = tmp_path / "models.py"
    path.write_text(SPEC)
    out = tmp_path / "result.json"
    size = ["--micro-batch", "3", "--accumulation-steps", "3"]
    assert main(["check", f"{path}:clean", *size, "--json", str(out)]) == 0
    assert capsys.readouterr().out.startswith("equivalent")
    assert json.loads(out.read_text())["comparisons"][0]["window"] == [3, 3, 3]
    assert main(["check", f"{path}:mixing", "--json", "-"]) == 1
    assert json.loads(capsys.readouterr().out)["culprits"][0]["kind"] == "batchnorm"


@pytest.mark.slow
def test_the_command_takes_a_plan(tmp_path, capsys) -> None:
    path = tmp_path / "models.py"
    path.write_text(SPEC)
    plan = ragged_plan(6, ((3, 3),)).save(tmp_path / "plan.json")
    assert main(["check", f"{path}:clean", "--plan", str(plan)]) == 0
    assert "3 + 3" in capsys.readouterr().out
    assert main(["check", f"{path}:clean", "--plan", str(plan), "--micro-batch", "2"]) == 2
    assert "not both" in capsys.readouterr().err


def test_a_stream_that_knows_its_length_is_read_as_a_stream():
    class Stream(torch.utils.data.IterableDataset):
        def __len__(self):
            return 12

        def __iter__(self):
            return iter(torch.randn(12, 4))

    result = check_equivalence(
        nn.Linear(4, 1), Stream(), micro_batch=2, accumulation_steps=2, loss=square
    )
    assert result.equivalent


def square(model, batch):
    return model(batch).square().mean()
