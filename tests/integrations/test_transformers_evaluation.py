"""The evaluation that a Trainer runs while it trains is probed, or said not to have been."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import autobatch
from autobatch.errors import DoesNotFitError

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")

from autobatch.integrations.transformers import tune_trainer  # noqa: E402
from tests.integrations.test_transformers import Texts, model  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")

EVALUATED, BATCH, LENGTH, WORDS = 2048, 64, 16, 1000
LOGITS = 4 * LENGTH * WORDS  # of one sample


def tune(folder: Path, kind: Any = None, gpu: Any = "t4", **options: Any) -> autobatch.Plan:
    arguments = {"eval_strategy": "epoch", "per_device_eval_batch_size": BATCH} | options
    metrics = (
        None
        if arguments.pop("without_metrics", False)
        else (lambda prediction, compute_result=True: {})
    )
    data = arguments.pop("evaluated", Texts(EVALUATED))
    trainer = (kind or transformers.Trainer)(
        model(),
        transformers.TrainingArguments(
            output_dir=str(folder), use_cpu=True, report_to=[], save_strategy="no", **arguments
        ),
        train_dataset=Texts(),
        eval_dataset=data,
        compute_metrics=metrics,
    )
    plan = tune_trainer(trainer, target=8, gpu=gpu)
    assert trainer.eval_dataset is data and "_prepare_inputs" not in vars(trainer)
    return plan


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> autobatch.Plan:
    """The plan of an evaluation that joins the logits of all batches."""
    return tune(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def in_parts(tmp_path_factory: pytest.TempPathFactory) -> autobatch.Plan:
    """The plan of one that keeps them batch by batch."""
    return tune(tmp_path_factory.mktemp("in_parts"), eval_do_concat_batches=False)


def peak(plan: autobatch.Plan) -> int:
    return plan.footprint.peak_allocated_bytes


@pytest.mark.slow
def test_the_logits_of_all_batches_are_kept_and_joined(whole: autobatch.Plan) -> None:
    before = EVALUATED - BATCH
    logits, labels = LOGITS * (before + BATCH + EVALUATED), 8 * LENGTH * (BATCH + EVALUATED)
    assert logits < peak(whole) < logits + labels + 2**25
    assert not [warning for warning in whole.warnings if "evaluation" in warning]


@pytest.mark.slow
def test_what_bounds_the_logits_bounds_the_peak(
    whole: autobatch.Plan, in_parts: autobatch.Plan, tmp_path: Path
) -> None:
    bounded = {
        "two batches": {"eval_accumulation_steps": 2},
        "one": {"batch_eval_metrics": True},
        "none": {"without_metrics": True},
        "none again": {"prediction_loss_only": True},
        "no evaluation": {"eval_strategy": "no"},
    }
    peaks = [peak(tune(tmp_path, **options)) for options in bounded.values()]
    assert peak(whole) > 5 * peaks[0] and peaks == sorted(peaks, reverse=True)
    assert peak(in_parts) < 0.6 * peak(whole)


@pytest.mark.slow
def test_inputs_that_metrics_ask_for_are_kept_too(in_parts: autobatch.Plan, tmp_path: Path) -> None:
    kept = tune(tmp_path, include_for_metrics=["inputs"], eval_do_concat_batches=False)
    inputs = 8 * LENGTH * (EVALUATED - BATCH)
    assert 0.9 * inputs < peak(kept) - peak(in_parts) < 1.1 * inputs + 2**12


@pytest.mark.slow
def test_the_largest_of_several_sets_is_evaluated(whole: autobatch.Plan, tmp_path: Path) -> None:
    both = tune(tmp_path, evaluated={"few": Texts(64), "many": Texts(EVALUATED)})
    assert peak(both) == peak(whole)


@pytest.mark.slow
def test_an_evaluation_that_does_not_fit_is_refused_with_what_helps(tmp_path: Path) -> None:
    card = autobatch.GpuSpec(name="tiny-card", capacity_bytes=120 * 2**20, context_bytes=0)
    with pytest.raises(DoesNotFitError, match=r"fits at micro-batch 8, but its evaluation does"):
        tune(tmp_path, gpu=card)
    assert tune(tmp_path, gpu=card, eval_accumulation_steps=1).micro_batch == 8


@pytest.mark.slow
def test_what_cannot_be_probed_is_said(tmp_path: Path) -> None:
    class Own(transformers.Trainer):
        def evaluation_loop(self, *args: Any, **options: Any) -> Any:
            return super().evaluation_loop(*args, **options)

    class Failing(transformers.Trainer):
        def prediction_step(self, *args: Any, **options: Any) -> Any:
            raise KeyError("labels")

    class Twice(transformers.Trainer):
        def evaluate(self, *args: Any, **options: Any) -> Any:
            return super().evaluate(*args, **options)

    for kind, reason in ((Own, "a loop of"), (Twice, "evaluate of its own"), (Failing, "KeyError")):
        (note,) = [w for w in tune(tmp_path, kind).warnings if "was not probed" in w]
        assert reason.replace("a loop of", "an evaluation loop of its own") in note

    class Stream(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter([Texts()[0]])

    warnings = tune(tmp_path, evaluated=Stream()).warnings
    assert [w for w in warnings if "not probed (its data set does not tell its length)" in w]
