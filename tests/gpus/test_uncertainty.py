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
    CONFIDENCE,
    NEEDED,
    SIMULATED_HEADROOM,
    likelihood_of,
    peak_range,
)
from autobatch.support.units import GIB, MIB
from tests.support import ROOT

RESULTS = ROOT / "reports" / "accuracy" / "results.json"


def test_the_errors_are_those_of_the_report():
    published = json.loads(RESULTS.read_text())["timm-peaks"]["needed"]
    assert {int(p): share for p, share in published.items()} == pytest.approx(NEEDED, abs=5e-4)


@given(st.integers(1, 10**12), st.integers(1, 10**12), st.integers(0, 10**12))
def test_more_room_is_never_less_likely_to_be_enough(reserved, usable, more):
    assert 0 < likelihood_of(reserved, usable) <= likelihood_of(reserved, usable + more) < 1


def test_a_peak_that_is_the_median_run_short_fits_every_second_time():
    assert likelihood_of(10**9, round(10**9 * (1 + NEEDED[50]))) == pytest.approx(0.5, abs=1e-6)


def test_the_default_headroom_is_as_safe_as_it_says():
    usable = 40 * GIB
    assert likelihood_of(round(usable * (1 - SIMULATED_HEADROOM)), usable) >= CONFIDENCE
    assert likelihood_of(round(usable * (1.02 - SIMULATED_HEADROOM)), usable) < CONFIDENCE


@given(st.integers(1, 10**12), st.integers(0, 10**10))
def test_a_range_holds_the_usual_run(reserved, context):
    low, high = peak_range(reserved, context)
    assert low <= reserved * (1 + NEEDED[50]) + context <= high + 1


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
    assert plan.likelihood >= plan.ceiling_likelihood >= CONFIDENCE
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
