from __future__ import annotations

import json
from dataclasses import replace

import pandas as pd
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import autobatch
from autobatch import FileError, GpuSpec, UnknownGpuError, UsageError, Workload, WorkloadError
from autobatch.choosing.compare import compare
from autobatch.choosing.comparison import Comparison
from autobatch.gpus.budget import budget_bytes
from autobatch.gpus.catalogue import CATALOGUE, find_gpu
from autobatch.gpus.uncertainty import SIMULATED_HEADROOM
from autobatch.records.progress import Progress
from autobatch.support.units import GIB, MIB
from tests.support.simulated import window_estimate

CARDS = ["t4", "rtx-4060", "l4", "rtx-4090", "a100-40gb", "a100-80gb", "h100-80gb", "rtx-5080"]


def small(name: str, capacity_bytes: int) -> GpuSpec:
    """A card of the catalogue with less memory: ceilings of small models are small on it."""
    card = find_gpu(name)
    return replace(
        card, name=f"{name}-small", capacity_bytes=capacity_bytes, context_bytes=20 * MIB
    )


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(3000, 256)
        self.layer = nn.TransformerEncoderLayer(256, 4, 512, batch_first=True)
        self.head = nn.Linear(256, 3000)

    def forward(self, tokens):
        return self.head(self.layer(self.embed(tokens))).logsumexp(-1).sum()


class Branches(nn.Linear):
    """Needs more memory where a value is large, which is not known."""

    def forward(self, data):
        states = super().forward(data)
        return torch.cat([states.exp(), states.sin()]) if states.sum() > 3 else states


class Careful(nn.Module):
    """Takes a wider layer on cards with much memory."""

    def __init__(self):
        super().__init__()
        width = 2048 if torch.cuda.get_device_properties(0).total_memory > 30 * GIB else 512
        self.layers = nn.Sequential(nn.Linear(512, width), nn.ReLU(), nn.Linear(width, 512))

    def forward(self, data):
        return self.layers(data)


def attention():
    return Workload(
        model=Attention(),
        batch=lambda n: torch.zeros(n, 256, dtype=torch.int64),
        autocast="fp16",
        clip_norm=1.0,
    )


def convolutions():
    layers = [nn.Conv2d(3, 64, 7, 2), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 128, 3, 2)]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(128))
    return Workload(model=model, batch=lambda n: torch.zeros(n, 3, 128, 128))


def branches():
    return Workload(model=Branches(4096, 4096), batch=lambda n: torch.zeros(n, 256, 4096))


def careful():
    return Workload(model=Careful(), batch=lambda n: torch.zeros(n, 4096, 512))


def shared_by_two():
    return Workload(
        model=nn.Sequential(nn.Linear(2048, 8192), nn.GELU(), nn.Linear(8192, 2048), nn.Tanh()),
        batch=lambda n: torch.zeros(n, 128, 2048),
        world_size=2,
        sharding="fsdp",
    )


MODELS = {
    "attention": attention,
    "convolutions": convolutions,
    "branches on unknown values": branches,
    "asks for the memory of its card": careful,
    "shared by two GPUs": shared_by_two,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_every_ceiling_is_what_tune_gives(name: str) -> None:
    build = MODELS[name]
    gpus = [*CARDS, small("t4", 1500 * MIB), small("l40s", 1500 * MIB), small("l4", 1500 * MIB)]
    compared = compare(build, target=512, gpus=gpus)
    for card, gpu in zip(compared.cards, gpus, strict=True):
        plan = autobatch.tune(build, target=512, gpu=gpu)
        outcome = card.outcome
        assert (outcome.ceiling, outcome.ceiling_at_least) == (
            plan.ceiling,
            plan.ceiling_at_least,
        )
        assert (outcome.micro_batch, outcome.accumulation_steps) == (
            plan.micro_batch,
            plan.accumulation_steps,
        )
        assert outcome.peak_reserved_bytes == plan.footprint.peak_reserved_bytes
        assert outcome.budget_bytes == plan.budget_bytes
        assert (outcome.likelihood, outcome.ceiling_likelihood) == (
            plan.likelihood,
            plan.ceiling_likelihood,
        )
        ours = compared.plan(card.gpu.name)
        for each in ("footprint", "ceiling_footprint", "curve", "timeline", "warnings", "method"):
            assert getattr(ours, each) == getattr(plan, each), each


def padded(samples):
    return nn.utils.rnn.pad_sequence(samples, batch_first=True)


@pytest.mark.slow
def test_batches_of_many_lengths_are_compared_as_tune_plans_them() -> None:
    lengths = [24, 100, 180, 256] * 64
    texts = [torch.zeros(length, dtype=torch.int64) for length in lengths]
    loader = DataLoader(texts, batch_size=8, collate_fn=padded)
    model, cards = Attention(), [small("l4", 1500 * MIB), small("l40s", 1500 * MIB)]
    compared = compare(model, target=512, gpus=cards, sample=loader)
    for card in compared.cards:
        plan = autobatch.tune(model, target=512, gpu=card.gpu, sample=loader)
        assert card.outcome.ceiling == plan.ceiling
        assert card.outcome.micro_batch == plan.micro_batch
        assert card.outcome.peak_reserved_bytes == plan.footprint.peak_reserved_bytes
        assert compared.plan(card.gpu.name).warnings == plan.warnings


def test_cards_of_one_compute_capability_share_executions() -> None:
    alone = compare(convolutions, target=8, gpus=["a100-40gb"]).executions
    # each has a ceiling of its own
    assert compare(convolutions, target=8, gpus=["a100-40gb", "a100-80gb"]).executions == alone + 1
    assert compare(convolutions, target=8, gpus=["a100-40gb", "t4"]).executions == 2 * alone


def test_a_model_is_built_once_unless_its_code_asks_for_the_card() -> None:
    built = []

    def plain():
        built.append("plain")
        return nn.Linear(8, 8)

    def asks():
        built.append(torch.cuda.get_device_name(0))
        return nn.Linear(8, 8)

    def generation():
        built.append(torch.cuda.get_device_capability())
        return nn.Linear(8, 8)

    for build in (plain, asks, generation):
        compare(build, target=8, gpus=["t4", "a100-40gb", "a100-80gb"])
    assert built == ["plain", "t4", "a100-40gb", "a100-80gb", (7, 5), (8, 0)]


def test_the_users_model_is_as_before() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    compare(model, target=8, gpus=["t4", "l4"], sample=torch.zeros(2, 8))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_seconds_are_the_estimate_of_the_planned_window() -> None:
    workload = convolutions()
    compared = compare(workload, target=512, gpus=["t4", "a100-40gb", "24GiB"])
    for card in compared.cards[:2]:
        estimate = window_estimate(
            workload,
            card.gpu,
            micro_batch=card.outcome.micro_batch,
            accumulation_steps=card.outcome.accumulation_steps,
        )
        window = card.outcome.window
        assert window.bound == estimate.bound
        assert (window.seconds, window.low, window.high) == pytest.approx(
            (estimate.seconds, estimate.low, estimate.high), rel=1e-4
        )
        assert window.evidence == "estimate"
    assert compared.cards[2].outcome.window is None
    assert "none for 24GiB: speed unknown" in str(compared)
    assert compared.fastest.gpu.name == "a100-40gb"


def test_cost_is_the_price_of_the_hours_on_all_gpus() -> None:
    compared = compare(
        convolutions, target=512, gpus=["t4", "l4"], prices={"T4": 0.35}, world_size=4
    )
    t4, l4 = compared.cards
    hours = t4.outcome.window.seconds * 1e6 / 512 / 3600
    assert t4.cost_per_million == pytest.approx(hours * 4 * 0.35)
    assert (t4.price_per_hour, l4.price_per_hour, l4.cost_per_million) == (0.35, None, None)
    assert compared.cheapest.gpu.name == "t4"
    assert compared.world_size == 4 and "4 of each card" in str(compared)
    assert "est. cost/1M" in str(compared)


def heavy():  # 11 GiB with AdamW
    with torch.device("meta"):
        layers = [nn.Linear(4096, 4096) for _ in range(44)]
    return Workload(model=nn.Sequential(*layers), batch=lambda n: torch.zeros(n, 4096))


def reserved(model, card: GpuSpec) -> int:
    account = autobatch.predict(model, micro_batch=1, accumulation_steps=2, gpu=card)
    return account.peak_reserved_bytes


@pytest.mark.slow
def test_a_card_that_is_too_small_says_by_how_much_and_which_would_do() -> None:
    compared = compare(heavy, target=32, gpus=["rtx-4060", "a100-40gb"])
    short, enough = (card.outcome for card in compared.cards)
    assert enough.fits and enough.short_bytes is None
    assert not short.fits and short.ceiling_at_least == 0 and short.micro_batch is None
    assert short.short_bytes == short.peak_reserved_bytes - short.budget_bytes > 0
    smallest = find_gpu(compared.smallest_card)
    smaller = [c for c in CATALOGUE.values() if c.capacity_bytes < smallest.capacity_bytes]
    nearest = max(smaller, key=lambda card: card.capacity_bytes)
    fits = {
        card.name: reserved(heavy, card)
        <= budget_bytes(card.capacity_bytes - card.context_bytes, SIMULATED_HEADROOM)
        for card in (find_gpu("rtx-4060"), nearest, smallest)
    }
    assert fits == {"rtx-4060": False, nearest.name: False, smallest.name: True}
    assert short.peak_reserved_bytes == reserved(heavy, find_gpu("rtx-4060"))
    text = str(compared)
    assert "1 of 2 cards can train" in text
    assert f"the smallest card of the catalogue that would do: {smallest.name}" in text


def test_where_all_cards_fit_no_other_card_is_named() -> None:
    compared = compare(convolutions, target=8, gpus=["t4"])
    assert compared.smallest_card is None
    assert "without a plan" not in str(compared)


def test_where_no_card_of_the_catalogue_would_do_that_is_said() -> None:
    def huge():
        with torch.device("meta"):
            model = nn.Sequential(*(nn.Linear(65536, 65536) for _ in range(4)))
        return Workload(model=model, batch=lambda n: torch.zeros(n, 65536))

    compared = compare(huge, target=8, gpus=["t4"])
    assert compared.smallest_card is None
    assert "no card of the catalogue would do" in str(compared)


def fails_on_t4():
    class Refuses(nn.Linear):
        def forward(self, data):
            if torch.cuda.get_device_capability()[0] < 8:
                raise RuntimeError("needs an Ampere card")
            return super().forward(data)

    return Workload(model=Refuses(8, 8), batch=lambda n: torch.zeros(n, 8))


def test_code_that_fails_on_one_card_leaves_the_others_standing() -> None:
    compared = compare(fails_on_t4, target=8, gpus=["t4", "a100-40gb"])
    t4, a100 = compared.cards
    assert a100.outcome.fits and not t4.outcome.fits
    assert "needs an Ampere card" in t4.outcome.failure
    assert t4.outcome.short_bytes is None and compared.smallest_card is None
    assert "Cards without a plan" in str(compared) and "needs an Ampere card" in str(compared)


def test_code_that_fails_on_every_card_is_an_error() -> None:
    with pytest.raises(WorkloadError, match="needs an Ampere card"):
        compare(fails_on_t4, target=8, gpus=["t4", "v100-16gb"])


def test_warnings_and_notes_that_all_plans_have_are_told_once() -> None:
    compared = compare(nn.Linear(8, 8), target=8, gpus=["t4", "l4"])
    for texts in (compared.warnings, compared.notes):
        assert len(texts) == len(set(texts)) > 0
        assert not any(text.startswith("t4") for text in texts)


def test_the_objective_chooses_among_what_fits() -> None:
    compared = compare(convolutions, target=4096, gpus=["h100-80gb"], objective="balanced")
    plan = autobatch.tune(convolutions, target=4096, gpu="h100-80gb", objective="balanced")
    assert compared.cards[0].outcome.micro_batch == plan.micro_batch


def test_a_card_of_unknown_speed_has_its_largest_plan_among_those_by_time() -> None:
    options = {"target": 64, "objective": "fastest"}
    found = compare(nn.Linear(64, 64), gpus=["t4", "1GiB"], **options)
    timed, other = found.cards
    assert timed.outcome.window is not None
    assert (other.outcome.micro_batch, other.outcome.window) == (64, None)
    note = "no plan by time for 1GiB: its speed is not known, so that the largest micro-batch"
    assert any(each.startswith(note) for each in found.notes)
    assert str(found).startswith("2 of 2 cards can train an effective batch of 64")
    with pytest.raises(UsageError, match="the speed of 1GiB is not known"):
        compare(nn.Linear(64, 64), gpus=["1GiB", "2GiB"], **options)
    short = compare(nn.Linear(16384, 16384), gpus=["t4", "1GiB"], **options)
    assert [card.outcome.fits for card in short.cards] == [True, False]
    assert not any("no plan by time" in each for each in short.notes)


def test_progress_names_the_card_and_never_goes_back() -> None:
    steps: list[Progress] = []
    compare(convolutions, target=64, gpus=["t4", "l4"], progress=steps.append)
    assert {step.step.partition(":")[0] for step in steps} == {"t4", "l4"}
    counts = [step.executions for step in steps]
    assert counts == sorted(counts)
    assert all(step.expected > step.executions or step.trial is not None for step in steps)


@pytest.fixture(scope="module")
def compared() -> Comparison:
    return compare(
        convolutions, target=512, gpus=["t4", "a100-40gb"], prices={"t4": 0.35}, headroom=0.2
    )


def test_a_saved_comparison_loads_as_it_was(compared: Comparison, tmp_path) -> None:
    loaded = Comparison.load(compared.save(tmp_path / "comparison.json"))
    assert loaded == compared
    assert loaded.cheapest == compared.cheapest and loaded.headroom == 0.2
    with pytest.raises(UsageError, match="has no plans"):
        loaded.plan("t4")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("cards"), "the key 'cards' is missing"),
        (lambda d: d.update(schema_version=9), "schema_version is '9'"),
        (lambda d: d["cards"][0]["outcome"].update(ceiling="many"), "cards.0..outcome.ceiling"),
    ],
)
def test_a_file_that_holds_no_comparison_is_refused(change, message, compared, tmp_path) -> None:
    document = json.loads(compared.to_json())
    change(document)
    (tmp_path / "x.json").write_text(json.dumps(document))
    with pytest.raises(FileError, match=message):
        Comparison.load(tmp_path / "x.json")


def test_the_table_is_a_data_frame_too(compared: Comparison) -> None:
    frame = compared.to_frame()
    assert isinstance(frame, pd.DataFrame)
    assert list(frame["gpu"]) == ["t4", "a100-40gb"]
    assert list(frame["ceiling"]) == [card.outcome.ceiling for card in compared.cards]
    assert str(frame["short_bytes"].dtype) == "Int64" and frame["short_bytes"].isna().all()
    assert set(frame["window_evidence"]) == {"estimate"}
    assert frame["estimated_cost_per_million"].notna().tolist() == [True, False]


def test_the_report_folder_holds_the_page_the_table_and_a_chart(compared, tmp_path) -> None:
    page = compared.report(tmp_path / "r")
    names = {path.relative_to(tmp_path / "r").as_posix() for path in (tmp_path / "r").rglob("*.*")}
    assert names == {
        "report.html",
        "report.md",
        "comparison.json",
        "comparison.csv",
        "charts/comparison.png",
        "charts/comparison.svg",
    }
    assert "estimate" in page.read_text() and "<svg" in page.read_text()
    assert Comparison.load(tmp_path / "r" / "comparison.json") == compared
    assert "| t4 |" in (tmp_path / "r" / "report.md").read_text()


def test_a_plan_is_given_by_any_spelling_of_its_card(compared: Comparison) -> None:
    assert compared.plan("A100 40GB").gpu.name == "a100-40gb"
    with pytest.raises(UsageError, match="h200 was not compared"):
        compared.plan("h200")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"gpus": []}, UsageError, "names no card"),
        ({"gpus": ["t4", "Tesla T4"]}, UsageError, "names t4 twice"),
        ({"gpus": ["t5"]}, UnknownGpuError, "'t5' is not in the catalogue"),
        ({"gpus": ["cuda:0"]}, UsageError, "compared simulated"),
        ({"gpus": [None]}, UsageError, "compared simulated"),
        ({"gpus": [7]}, UsageError, "compared simulated"),
        ({"prices": {"l4": 1.0}}, UsageError, "a price for l4, which is not compared"),
        ({"prices": {"t4": -1.0}}, UsageError, "price of t4 is -1.0"),
        ({"prices": {"t4": float("nan")}}, UsageError, "price of t4 is nan"),
        ({"prices": {"t4": "2"}}, UsageError, "price of t4 is '2'"),
        ({"prices": {"t4": 10**400}}, UsageError, "price of t4 is an int: give a number"),
        ({"prices": {"t4": 10**5000}}, UsageError, "price of t4 is an int: give a number"),
        ({"prices": {7: 1.0}}, UsageError, "a price for 7: prices are by names"),
        ({"prices": [1.0]}, UsageError, "prices is \\[1.0\\]: use a dict"),
        ({"gpus": 7}, UsageError, "gpus is 7: use gpus="),
        ({"prices": {"t4": 1.0, "T4": 2.0}}, UsageError, "two prices for t4"),
        ({"target": 0}, UsageError, "target effective batch is 0"),
        ({"headroom": 1.0}, UsageError, "headroom is 1.0"),
        ({"objective": "best"}, UsageError, "objective"),
        ({"optimizer": "sgdd"}, UsageError, "sgdd"),
    ],
)
def test_bad_input_is_refused_in_one_line(options, error, message) -> None:
    given = {"target": 8, "gpus": ["t4"]} | options
    with pytest.raises(error, match=message) as caught:
        compare(nn.Linear(8, 8), **given)
    assert "\n" not in str(caught.value)
