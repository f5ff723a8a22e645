"""Ranges and likelihoods are those of the published errors."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import autobatch
from autobatch.gpus.uncertainty import (
    CONTEXT_READINGS,
    NEEDED,
    SIMULATED_HEADROOM,
    likelihood_of,
    peak_range,
)
from autobatch.support.units import GIB, MIB
from tests.support import ROOT

RESULTS = ROOT / "reports" / "accuracy" / "results.json"
READINGS = ROOT / "reports" / "hardware" / "nvidia-h200-torch2.11.0-convolutions.json"
KINDS = st.sampled_from(list(NEEDED))


@pytest.mark.parametrize(("kind", "table"), [("convolutions", "timm-peaks"), ("products", "steps")])
def test_the_errors_are_those_of_the_report(kind, table):
    published = json.loads(RESULTS.read_text())[table]["needed"]
    found = {int(p): share for p, share in published.items()}
    assert found == pytest.approx(NEEDED[kind], abs=5e-4)


def test_the_readings_of_contexts_are_those_of_the_report():
    steps = json.loads(READINGS.read_text())["contexts"]
    added = {step["step"]: step.get("delta_bytes") for step in steps}
    attention = sum(size for name, size in added.items() if name.startswith("attention"))
    assert CONTEXT_READINGS["context"] == added["context"]
    assert CONTEXT_READINGS["cuBLAS"] == added["matmul fp32"]
    assert CONTEXT_READINGS["attention"] == attention
    assert CONTEXT_READINGS["NCCL, one rank"] == added["NCCL, one rank"]
    assert sum(CONTEXT_READINGS.values()) == steps[-1]["outside_bytes"] - steps[0]["used_bytes"]


def test_a_model_without_convolutions_has_the_errors_of_products():
    def footprint(model, sample, **more):
        return autobatch.predict(
            model, micro_batch=4, sample=sample, loss=lambda m, x: m(x).mean(), gpu="t4", **more
        )

    linear = footprint(nn.Linear(64, 64), torch.zeros(2, 64))
    convolution = footprint(nn.Conv2d(3, 8, 3), torch.zeros(2, 3, 16, 16))
    assert linear.kind == "products"
    assert convolution.kind == "convolutions"
    shared = footprint(nn.Linear(64, 64), torch.zeros(2, 64), world_size=2)
    assert shared.high_device_bytes > linear.high_device_bytes + 400 * MIB  # NCCL


@given(st.integers(1, 10**12), st.integers(1, 10**12), st.integers(0, 10**12), KINDS)
def test_more_room_is_never_less_likely_to_be_enough(reserved, usable, more, kind):
    less = likelihood_of(reserved, usable, kind)
    assert 0 < less <= likelihood_of(reserved, usable + more, kind) < 1


@pytest.mark.parametrize("kind", NEEDED)
def test_a_peak_that_is_the_median_run_short_fits_every_second_time(kind):
    usable = round(10**9 * (1 + NEEDED[kind][50]))
    assert likelihood_of(10**9, usable, kind) == pytest.approx(0.5, abs=1e-4)


def test_percentiles_rise():
    for needed in NEEDED.values():
        assert list(needed.values()) == sorted(needed.values())


def test_the_default_headroom_is_as_safe_as_it_says():
    usable = 40 * GIB
    assert likelihood_of(round(usable * (1 - SIMULATED_HEADROOM)), usable) >= 0.95
    assert likelihood_of(round(usable * (1.03 - SIMULATED_HEADROOM)), usable) < 0.95


@given(st.integers(1, 10**12), st.integers(0, 10**10), KINDS)
def test_a_range_holds_the_usual_run(reserved, context, kind):
    low, high = peak_range(reserved, context, kind)
    assert low <= reserved * (1 + NEEDED[kind][50]) + context <= high + 1


def test_a_simulated_plan_says_how_sure_it_is(tmp_path):
    plan = autobatch.tune(
        nn.Linear(4096, 4096),
        target=64,
        sample=torch.zeros(2, 4096),
        loss=lambda model, batch: model(batch).mean(),
        gpu="t4",
        cache=False,
    )
    footprint = plan.footprint
    assert plan.headroom == SIMULATED_HEADROOM
    assert footprint.low_device_bytes < footprint.peak_device_bytes < footprint.high_device_bytes
    assert plan.likelihood >= plan.ceiling_likelihood >= 0.95
    assert "likely to fit" in str(plan)
    assert autobatch.Plan.load(plan.save(tmp_path / "plan.json")).likelihood == plan.likelihood


def test_a_prediction_carries_a_range():
    footprint = autobatch.predict(
        nn.Linear(64, 64),
        micro_batch=4,
        sample=torch.zeros(2, 64),
        loss=lambda model, batch: model(batch).mean(),
        gpu="t4",
    )
    assert footprint.high_device_bytes - footprint.low_device_bytes > MIB


@pytest.mark.parametrize("ranks", [1, 2])
@given(st.integers(2**28, 2**34), st.integers(0, 2**33), st.integers(0, 2**30), KINDS)
def test_a_plan_is_no_surer_than_its_range(ranks, reserved, spare, context, kind):
    usable = reserved + spare
    _, most = peak_range(reserved, context, kind, world_size=ranks)
    likely = likelihood_of(reserved, usable, kind, context_bytes=context, world_size=ranks)
    assert likely <= likelihood_of(reserved, usable, kind)
    if most > usable + context:
        assert likely <= 0.95
