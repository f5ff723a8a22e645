import pytest
import torch
import torch.nn.functional as F
from torch import nn

import autobatch
from autobatch import GpuSpec
from autobatch.support.units import MIB
from autobatch.tuning import what_if as module

FEW = GpuSpec(name="few-fit", capacity_bytes=300 * MIB, context_bytes=20 * MIB)
MANY = GpuSpec(name="many-fit", capacity_bytes=700 * MIB, context_bytes=20 * MIB)


def cross_entropy(model, batch):
    images, labels = batch
    return F.cross_entropy(model(images), labels)


def heavy():
    """About 7 MiB of activations for each sample."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.LazyLinear(10),
    )  # fmt: skip


def light():
    return nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 4096), nn.Linear(4096, 10))


WORKLOADS = {
    "images": (
        lambda: heavy(),
        {
            "sample": (torch.zeros(2, 3, 64, 64), torch.zeros(2, dtype=torch.int64)),
            "loss": cross_entropy,
            "gpu": FEW,
            "target": 48,
        },
    ),
    "features": (
        light,
        {
            "sample": (torch.zeros(4, 64), torch.zeros(4, dtype=torch.int64)),
            "loss": cross_entropy,
            "gpu": MANY,
            "target": 20_000,
        },
    ),
}


@pytest.fixture(scope="module", params=WORKLOADS)
def workload(request):
    build, options = WORKLOADS[request.param]
    model = build()
    if isinstance(model[-1], nn.modules.lazy.LazyModuleMixin):
        with torch.no_grad():
            model(options["sample"][0])
    return model, options


@pytest.fixture(scope="module")
def plan(workload):
    model, options = workload
    return autobatch.tune(model, **options)


def test_a_simulated_plan_knows_its_own_ceiling_and_some_others(plan):
    known = plan.what_if
    own = known.cards[0]
    assert own.name == plan.gpu.name
    assert own.ceilings[own.headrooms.index(plan.headroom)] == plan.ceiling
    assert len(own.headrooms) >= 3
    assert list(own.headrooms) == sorted(own.headrooms)
    assert list(own.ceilings) == sorted(own.ceilings, reverse=True)
    assert len(known.micro_batches) == len(known.peak_reserved_bytes)


@pytest.mark.slow
def test_every_ceiling_is_the_one_that_tune_finds(workload, plan):
    model, options = workload
    own = plan.what_if.cards[0]
    pairs = list(zip(own.headrooms, own.ceilings, strict=True))
    for headroom, ceiling in pairs[:: max(1, len(pairs) // 6)]:
        assert autobatch.tune(model, **options | {"headroom": headroom}).ceiling == ceiling


def test_peaks_are_those_of_the_account_that_tune_gives(workload, plan):
    model, options = workload
    peaks = dict(zip(plan.what_if.micro_batches, plan.what_if.peak_reserved_bytes, strict=True))
    compared = 0
    for target in (options["target"] * times for times in (2, 4, 8)):
        other = autobatch.tune(model, **options | {"target": target})
        if other.micro_batch in peaks and other.accumulation_steps > 1:
            compared += 1
            assert peaks[other.micro_batch] == other.footprint.peak_reserved_bytes
    assert compared


class Recurrent(nn.Module):
    """So many sizes are asked of it that no prediction is left."""

    def __init__(self):
        super().__init__()
        self.inner = nn.LSTM(64, 256, 2, batch_first=True)
        self.outer = nn.Linear(256, 10)

    def forward(self, x):
        return self.outer(self.inner(x)[0][:, -1])


@pytest.mark.parametrize("build", [lambda: nn.Sequential(nn.Flatten(), nn.Linear(1920, 10)),
                                   Recurrent])  # fmt: skip
def test_the_peak_of_one_sample_is_known(build):
    model, sample = build(), (torch.zeros(2, 30, 64), torch.zeros(2, dtype=torch.int64))
    options = {"sample": sample, "loss": cross_entropy, "gpu": "1GiB"}
    known = autobatch.tune(model, target=1_000_003, **options).what_if
    one = autobatch.predict(model, micro_batch=1, accumulation_steps=2, **options)
    assert known.micro_batches[0] == 1
    assert known.peak_reserved_bytes[0] == one.peak_reserved_bytes


def test_cards_that_run_the_same_kernels_are_offered_with_their_ceilings():
    big = nn.Sequential(nn.Embedding(1000, 2048), *[nn.Linear(2048, 2048) for _ in range(6)])
    sample = torch.zeros(2, 1024, dtype=torch.int64)

    def loss(model, batch):
        return model(batch).float().pow(2).mean()

    options = {"target": 4096, "sample": sample, "loss": loss}
    plan = autobatch.tune(big, gpu="a100-40gb", **options)
    names = [card.name for card in plan.what_if.cards]
    assert names == ["a100-40gb", "a100-80gb"]
    other = plan.what_if.cards[1]
    for headroom in (plan.headroom, other.headrooms[0], other.headrooms[-1]):
        there = autobatch.tune(big, gpu="a100-80gb", headroom=headroom, **options)
        assert there.ceiling == other.ceilings[other.headrooms.index(headroom)]


class AsksForItsCard(nn.Module):
    """Does more on a larger card."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(2048, 2048)

    def forward(self, x):
        wide = torch.cuda.get_device_properties(0).total_memory > 50 * 2**30
        return self.inner(x + x if wide else x)


def test_code_that_asks_for_its_card_is_answered_for_no_other():
    sample = torch.zeros(2, 512, 2048)
    options = {"target": 4096, "sample": sample, "loss": lambda m, x: m(x).pow(2).mean()}
    plan = autobatch.tune(AsksForItsCard(), gpu="a100-40gb", **options)
    assert [card.name for card in plan.what_if.cards] == ["a100-40gb"]


def test_no_more_peaks_are_predicted_than_a_share_of_the_tuning(workload, monkeypatch):
    model, options = workload
    predicted = []
    real = module._Known._add

    def counted(self, micro_batch, keeping=0):
        predicted.append(micro_batch not in self.peaks and self._left > keeping)
        return real(self, micro_batch, keeping)

    monkeypatch.setattr(module._Known, "_add", counted)
    autobatch.tune(model, **options)
    assert 0 < sum(predicted) <= module._PREDICTIONS


def test_a_plan_by_time_and_one_without_accumulation_have_no_other_answers(workload):
    model, options = workload
    single = autobatch.tune(model, **options | {"target": 1})
    assert single.what_if is None
    fast = autobatch.tune(model, **options | {"objective": "fastest", "gpu": "t4", "target": 64})
    assert fast.what_if is None


def test_what_was_assumed_is_a_note_and_no_warning(workload):
    model, options = workload
    inferred = autobatch.tune(model, **options | {"loss": None})
    assert inferred.warnings == ()
    assert any("cross entropy" in note for note in inferred.notes)


def test_what_must_be_acted_on_is_a_warning():
    sample = torch.zeros(4, 64)
    plan = autobatch.tune(light(), sample=sample, target=64, gpu=MANY)
    assert any("sum of the outputs stood in" in warning for warning in plan.warnings)
