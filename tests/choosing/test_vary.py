from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import autobatch
from autobatch import FileError, NoGpuError, UsageError, Workload, WorkloadError
from autobatch.choosing.frontier import Frontier
from autobatch.choosing.outcomes import measured_window
from autobatch.choosing.vary import vary
from autobatch.devices.virtual.gpu import VirtualGpu
from autobatch.gpus.catalogue import find_gpu
from autobatch.records.comparison import WindowTime
from autobatch.support.units import MIB
from tests.support.plans import example_plan
from tests.support.simulated import window_estimate

CARD = replace(find_gpu("t4"), name="small-t4", capacity_bytes=700 * MIB, context_bytes=20 * MIB)


class Reader(nn.Module):
    def __init__(self, depth: int = 1):
        super().__init__()
        self.embed = nn.Embedding(2000, 128)
        layers = [nn.TransformerEncoderLayer(128, 4, 256, batch_first=True) for _ in range(depth)]
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(128, 2000)

    def forward(self, tokens):
        return self.head(self.layers(self.embed(tokens))).logsumexp(-1).mean()


MODEL = Reader()


def reading(seq: int) -> Workload:
    return Workload(model=MODEL, batch=lambda n: torch.zeros(n, seq, dtype=torch.int64))


def deep(depth: int) -> Workload:
    return Workload(model=Reader(depth), batch=lambda n: torch.zeros(n, 64, dtype=torch.int64))


@pytest.fixture(scope="module")
def found() -> Frontier:
    return vary(reading, [512, 64, 128, 256], target=120, gpu=CARD, autocast="fp16")


@pytest.mark.slow
def test_every_ceiling_is_what_tune_gives(found: Frontier) -> None:
    assert [point.value for point in found.points] == [64, 128, 256, 512]
    for point in found.points:
        plan = autobatch.tune(reading(point.value), target=120, gpu=CARD, autocast="fp16")
        outcome = point.outcome
        assert (outcome.ceiling, outcome.micro_batch) == (plan.ceiling, plan.micro_batch)
        assert outcome.accumulation_steps == plan.accumulation_steps
        assert outcome.ceiling_likelihood == plan.ceiling_likelihood
        assert found.plans[point.value].footprint == plan.footprint
    ceilings = [point.outcome.ceiling for point in found.points]
    assert ceilings == sorted(set(ceilings), reverse=True)


@pytest.mark.slow
def test_a_parameter_of_the_model_may_vary_too() -> None:
    found = vary(deep, [1, 4], target=120, gpu=CARD)
    for point in found.points:
        assert (
            point.outcome.ceiling == autobatch.tune(deep(point.value), target=120, gpu=CARD).ceiling
        )
    assert found.parameter == "depth"
    with pytest.raises(UsageError, match="no buckets along depth"):
        found.buckets()
    assert any("other parameters for each depth" in warning for warning in found.warnings)


def test_throughput_is_tokens_of_the_window_by_its_estimated_seconds(found: Frontier) -> None:
    assert found.unit == "tokens"
    for point in found.points:
        estimate = window_estimate(
            replace(reading(point.value), autocast="fp16"),
            CARD,
            micro_batch=point.outcome.micro_batch,
            accumulation_steps=point.outcome.accumulation_steps,
        )
        assert point.outcome.window.seconds == estimate.seconds
        assert point.outcome.window.evidence == "estimate"
        assert found.throughput(point) == pytest.approx(120 * point.value / estimate.seconds)
    assert "est. tokens/s" in str(found)


def test_images_are_counted_in_samples() -> None:
    def build(size):
        layers = nn.Sequential(nn.Conv2d(3, 16, 3), nn.AdaptiveAvgPool2d(1))
        return Workload(model=layers, batch=lambda n: torch.zeros(n, 3, size, size))

    found = vary(build, [32, 64], target=60, gpu="t4")
    assert found.unit == "samples"
    (small, _) = found.points
    assert found.throughput(small) == pytest.approx(60 / small.outcome.window.seconds)


def test_buckets_fit_together_in_one_run(found: Frontier) -> None:
    buckets = found.buckets()
    assert list(buckets) == [64, 128, 256, 512]
    workload = replace(reading(512), autocast="fp16")
    order = [*buckets.items(), *reversed(buckets.items()), *buckets.items()]
    batches = iter([torch.zeros(size, seq, dtype=torch.int64) for seq, size in order] * 4)
    run = VirtualGpu(CARD).run(
        replace(workload, batch=lambda n: next(batches)),
        micro_batch=8,
        accumulation_steps=2,
        windows=len(order) // 2,
    )
    budget = found.points[0].outcome.budget_bytes
    assert run.replay.peak_reserved_bytes <= 1.02 * found.mixed_reserved_bytes
    assert run.replay.peak_allocated_bytes <= budget
    for point in found.points:
        assert 1 <= point.bucket <= point.outcome.micro_batch


@pytest.mark.slow
def test_buckets_shrink_where_their_micro_batches_do_not_fit_together() -> None:
    # one size of block for each width: what a short batch leaves serves no longer one
    found = vary(reading, range(96, 160, 8), target=10_000, gpu=CARD)
    smaller = [p.value for p in found.points if p.bucket < p.outcome.micro_batch]
    budget = found.points[0].outcome.budget_bytes
    over = found.mixed_reserved_bytes > budget
    said = " ".join(found.warnings)
    assert bool(smaller) == ("buckets are smaller" in said)
    assert over == ("release its cache" in said)
    assert smaller or over  # else this shows nothing


def test_a_value_that_is_too_large_says_by_how_much(found: Frontier) -> None:
    long = vary(reading, [64, 65536], target=120, gpu=CARD)
    short = long.points[1].outcome
    assert not short.fits
    assert short.short_bytes == short.peak_reserved_bytes - short.budget_bytes > 0
    assert "65,536: micro-batch 1 needs" in str(long)
    assert long.points[0].bucket is None  # one bucket is none


def test_a_value_that_fails_leaves_the_others_standing() -> None:
    def build(seq):
        if seq > 100:
            raise ValueError("at most 100 positions")
        return reading(seq)

    found = vary(build, [64, 128], target=12, gpu="t4")
    assert found.points[0].outcome.fits
    assert "at most 100 positions" in found.points[1].outcome.failure
    assert "at most 100 positions" in str(found)
    with pytest.raises(WorkloadError, match="at most 100 positions"):
        vary(build, [128, 256], target=12, gpu="t4")


@pytest.mark.slow
def test_a_parameter_that_changes_nothing_is_said_to() -> None:
    found = vary(lambda seq: reading(64), [64, 128], target=120, gpu=CARD)
    assert any("may not depend on it" in warning for warning in found.warnings)
    assert not any(
        "may not depend" in warning
        for warning in vary(reading, [64, 128], target=120, gpu=CARD).warnings
    )


def test_notes_that_differ_in_the_value_alone_name_the_parameter() -> None:
    def build(seq):
        return replace(reading(seq), notes=(f"sequences of {seq} tokens", "the same"))

    found = vary(build, [64, 128], target=12, gpu="t4")
    assert {"sequences of seq tokens", "the same"} <= set(found.notes)


def test_the_users_model_is_as_before() -> None:
    before = {name: tensor.clone() for name, tensor in MODEL.state_dict().items()}
    vary(reading, [64, 128], target=12, gpu="t4")
    assert all(torch.equal(before[name], tensor) for name, tensor in MODEL.state_dict().items())


def test_a_measured_window_takes_the_time_of_its_micro_batches() -> None:
    plan = example_plan()
    trial = replace(
        plan.trials[0], micro_batch=plan.micro_batch, accumulation_steps=2, window_seconds=0.5
    )
    window = measured_window(replace(plan, trials=(trial, *plan.trials[1:])))
    assert window == WindowTime(seconds=0.25 * plan.accumulation_steps, evidence="measured")
    assert measured_window(replace(plan, trials=())) is None


def test_a_frontier_names_itself_in_one_line(found: Frontier) -> None:
    assert repr(found).startswith("<Frontier of Reader on small-t4: micro-batch by seq {64: ")


def test_a_saved_frontier_loads_as_it_was(found: Frontier, tmp_path) -> None:
    loaded = Frontier.load(found.save(tmp_path / "frontier.json"))
    assert loaded == found and loaded.buckets() == found.buckets()
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(FileError, match="is not a frontier"):
        Frontier.load(tmp_path / "x.json")


def test_the_table_is_a_data_frame_too(found: Frontier) -> None:
    frame = found.to_frame()
    assert list(frame["seq"]) == [64, 128, 256, 512]
    assert list(frame["bucket"]) == list(found.buckets().values())
    assert set(frame["window_evidence"]) == {"estimate"} and "tokens_per_second" in frame


def test_the_report_folder_holds_the_page_the_table_and_a_chart(found, tmp_path) -> None:
    page = found.report(tmp_path / "r")
    assert "<svg" in page.read_text() and "estimate" in page.read_text()
    assert (tmp_path / "r" / "charts" / "frontier.png").stat().st_size > 10_000
    assert Frontier.load(tmp_path / "r" / "frontier.json") == found
    assert (tmp_path / "r" / "frontier.csv").read_text().startswith("seq,")


@pytest.mark.slow
def test_an_integer_parameter_of_a_spec_varies() -> None:
    pytest.importorskip("transformers")
    spec = "hf:gpt2?n_layer=1&n_embd=64&n_head=2&vocab_size=1000&seq=7"
    found = vary(spec, [32, 64], name="seq", target=12, gpu="t4")
    assert [point.tokens_per_sample for point in found.points] == [32, 64]
    assert list(found.buckets()) == [32, 64]
    layers = vary(spec, [1, 2], name="n_layer", target=12, gpu="t4")
    one, two = (plan.model.parameters for plan in layers.plans.values())
    assert two - one == 12 * 64**2 + 13 * 64  # of a block of GPT-2
    with pytest.raises(UsageError, match=r"has no 'n_layers' .did you mean"):
        vary(spec, [1, 2], name="n_layers", target=12, gpu="t4")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"values": []}, "there are no values"),
        ({"values": [64, 64]}, "64 is given twice"),
        ({"values": 64}, "values is 64: use a list"),
        ({"name": 5}, "name is 5: give the name"),
        ({"values": [64.0]}, "a value is 64.0"),
        ({"values": ["64"]}, "a value is '64'"),
        ({"values": [True]}, "a value is True"),
        ({"values": [0]}, "a value is 0"),
        ({"sample": torch.zeros(2, 8)}, "a sample is of one size"),
        ({"build": 7}, "build is a int"),
        ({"build": "hf:gpt2"}, "name the parameter"),
        ({"build": "m.py:f", "name": "seq"}, "no such file: m.py"),
        ({"target": -1}, "target effective batch is -1"),
        ({"headroom": 2}, "headroom is 2"),
        ({"objective": "best"}, "objective"),
        ({"gpu": "t5"}, "'t5' is not in the catalogue"),
    ],
)
def test_bad_input_is_refused_in_one_line(options, message) -> None:
    given = {"build": reading, "values": [64], "target": 8, "gpu": "t4"} | options
    with pytest.raises(UsageError, match=message) as caught:
        vary(given.pop("build"), given.pop("values"), **given)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure")
def test_without_a_gpu_one_has_to_be_named() -> None:
    with pytest.raises(NoGpuError):
        vary(reading, [64], target=8)
