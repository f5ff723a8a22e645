import random
import subprocess
import sys
import traceback

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import TensorDataset

import autobatch
from autobatch import (
    DoesNotFitError,
    GpuSpec,
    NoGpuError,
    SampleError,
    UnknownGpuError,
    UsageError,
    Workload,
    WorkloadError,
)
from autobatch.gpus.uncertainty import SIMULATED_HEADROOM
from autobatch.records.split import split
from autobatch.support.units import MIB
from tests.support.busy import TOKENS, lm_loss, trained

SMALL_CARD = GpuSpec(name="small-card", capacity_bytes=200 * MIB, context_bytes=20 * MIB)
SAMPLE = (torch.zeros(4, 64), torch.zeros(4, dtype=torch.int64))


def cross_entropy(model, batch):
    images, labels = batch
    return F.cross_entropy(model(images), labels)


def perceptron():
    return nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 4096), nn.Linear(4096, 10))


def tune(model=None, **options):
    given = {"target": 256, "sample": SAMPLE, "loss": cross_entropy, "gpu": SMALL_CARD}
    return autobatch.tune(model or perceptron(), **given | options)


def one_line(caught):
    message = str(caught.value)
    assert message and "\n" not in message
    return message


# What a plan says


def test_a_plan_holds_the_answer_and_its_evidence():
    plan = tune(target=20_000)
    assert plan.effective_batch == plan.target == 20_000
    assert plan.micro_batch * plan.accumulation_steps == 20_000
    assert plan.micro_batch <= plan.ceiling == plan.ceiling_at_least
    assert plan.budget_bytes == int(180 * MIB * (1 - SIMULATED_HEADROOM))
    assert plan.ceiling_footprint.peak_reserved_bytes <= plan.budget_bytes
    assert plan.ceiling_footprint.evidence == "simulated"
    assert plan.footprint.micro_batch == plan.micro_batch
    assert plan.footprint.peak_reserved_bytes + plan.slack_bytes == plan.budget_bytes
    assert (plan.method, plan.executions, plan.ooms) == ("trace model", 2, 0)
    assert [trial.micro_batch for trial in plan.trials] == [23, plan.ceiling]
    assert plan.model.parameters == plan.model.trainable_parameters == 2_175_498
    assert (plan.model.optimizer, plan.model.loss) == ("AdamW", "user")
    assert plan.warnings == ()
    assert plan.versions["torch"] == torch.__version__
    sizes = [point.micro_batch for point in plan.curve]
    assert sizes == sorted(set(sizes)) and plan.ceiling in sizes


def test_the_ceiling_is_true_by_direct_prediction_of_both_sides():
    plan = tune(target=20_000)
    below, above = (
        autobatch.predict(
            perceptron(),
            micro_batch=plan.ceiling + more,
            accumulation_steps=2,
            sample=SAMPLE,
            loss=cross_entropy,
            gpu=SMALL_CARD,
        )
        for more in (0, 1)
    )
    assert below.peak_reserved_bytes <= plan.budget_bytes < above.peak_reserved_bytes


def test_a_target_below_the_ceiling_runs_the_window_without_accumulation_too():
    plan = tune(target=64)
    assert (plan.micro_batch, plan.accumulation_steps) == (64, 1)
    assert plan.footprint.accumulation_steps == 1
    assert plan.footprint.evidence == "simulated"
    assert plan.trials[-1].accumulation_steps == 1
    assert plan.executions == 3


def test_a_quadratic_loss_is_noticed_without_accumulation_too():
    def contrastive(model, batch):
        hidden = model(batch[0])
        labels = torch.arange(hidden.size(0), device=hidden.device)
        return F.cross_entropy(hidden @ hidden.t(), labels)

    plan = tune(target=64, loss=contrastive)
    assert plan.method == "trace model (quadratic)"
    assert "square of the micro-batch" in plan.warnings[0]
    direct = autobatch.predict(
        perceptron(),
        micro_batch=plan.ceiling + 1,
        accumulation_steps=2,
        sample=SAMPLE,
        loss=contrastive,
        gpu=SMALL_CARD,
    )
    assert (
        direct.peak_reserved_bytes > plan.budget_bytes >= plan.ceiling_footprint.peak_reserved_bytes
    )


@pytest.mark.parametrize("target", [64, 65_536])
def test_the_samples_of_an_update_divided_otherwise_are_accounted_for(target):
    plan = tune(target=target)
    other = plan.otherwise
    assert other is not None
    assert (other.accumulation_steps == 1) == (plan.accumulation_steps > 1)
    assert other.micro_batch * other.accumulation_steps == target
    executed = autobatch.predict(
        perceptron(),
        micro_batch=other.micro_batch,
        accumulation_steps=other.accumulation_steps,
        sample=SAMPLE,
        loss=cross_entropy,
        gpu=SMALL_CARD,
    )
    assert other.peak_allocated_bytes == executed.peak_allocated_bytes
    assert dict(other.categories) == executed.categories


def test_a_target_of_one_sample_per_gpu_searches_the_window_without_accumulation():
    plan = tune(target=3, world_size=3)
    assert (plan.micro_batch, plan.accumulation_steps, plan.world_size) == (1, 1, 3)
    assert {trial.accumulation_steps for trial in plan.trials} == {1}


def test_a_data_set_caps_the_micro_batch_at_its_length():
    data = TensorDataset(torch.zeros(50, 64), torch.zeros(50, dtype=torch.int64))
    plan = tune(target=200, sample=data)
    assert plan.ceiling is None
    assert plan.ceiling_at_least == 50
    assert (plan.micro_batch, plan.accumulation_steps) == (50, 4)
    assert max(trial.micro_batch for trial in plan.trials) == 50
    assert any("stopped at micro-batch 50" in note for note in plan.notes)


def test_the_search_of_a_model_that_always_fits_stops_at_its_limit_and_says_so():
    plan = tune(nn.Linear(4, 2), sample=torch.zeros(2, 4), loss=None, gpu="b200")
    assert plan.ceiling is None
    assert plan.ceiling_at_least == 2**16
    assert any("stopped at micro-batch 65,536" in note for note in plan.notes)
    assert plan.model.loss == "surrogate sum"
    assert any("sum of the outputs" in warning for warning in plan.warnings)


def test_headroom_lowers_the_budget_and_the_ceiling():
    tight, none = tune(headroom=0.5), tune(headroom=0.0)
    assert tight.budget_bytes == 90 * MIB and none.budget_bytes == 180 * MIB
    assert tight.ceiling < none.ceiling


def test_a_gradient_waiting_in_memory_lowers_the_ceiling_with_accumulation():
    # 8 MiB of gradients are alive in the second micro-batch's forward pass and not in the first's.
    options = {"sample": SAMPLE, "loss": cross_entropy, "gpu": SMALL_CARD}
    one, two, many = (
        autobatch.predict(perceptron(), micro_batch=900, accumulation_steps=steps, **options)
        for steps in (1, 2, 7)
    )
    assert one.peak_allocated_bytes < two.peak_allocated_bytes == many.peak_allocated_bytes
    assert (one.accumulation_steps, many.accumulation_steps) == (1, 7)


@pytest.mark.parametrize("steps", [1, 2])
def test_predict_agrees_with_the_footprint_that_tune_found_at_that_size(steps):
    plan = tune(target=128 if steps == 1 else 40_000, autocast="bf16", clip_norm=1.0)
    predicted = autobatch.predict(
        perceptron(),
        micro_batch=plan.micro_batch,
        accumulation_steps=plan.accumulation_steps,
        sample=SAMPLE,
        loss=cross_entropy,
        gpu=SMALL_CARD,
        autocast="bf16",
        clip_norm=1.0,
    )
    assert (plan.accumulation_steps == 1) == (steps == 1)
    assert predicted.categories == plan.footprint.categories
    assert predicted.peak_reserved_bytes == plan.footprint.peak_reserved_bytes
    assert predicted.accumulation_steps == plan.accumulation_steps


def test_predict_accounts_for_what_does_not_fit():
    footprint = autobatch.predict(
        perceptron(), micro_batch=10**6, sample=SAMPLE, loss=cross_entropy, gpu=SMALL_CARD
    )
    assert footprint.peak_reserved_bytes > 100 * SMALL_CARD.capacity_bytes
    assert footprint.inputs_bytes >= 10**6 * (64 * 4 + 8)


def test_a_workload_keeps_its_own_options_where_none_is_given():
    workload = Workload(
        model=perceptron(),
        batch=lambda n: (torch.zeros(n, 64), torch.zeros(n, dtype=torch.int64)),
        loss=cross_entropy,
        optimizer=torch.optim.SGD,
        autocast="bf16",
        sample_limit=30,
        notes=("labels are made up",),
    )
    plan = autobatch.tune(workload, target=60, gpu=SMALL_CARD, optimizer=torch.optim.Adagrad)
    assert (plan.model.optimizer, plan.model.autocast) == ("Adagrad", "bf16")
    assert plan.ceiling_at_least == 30
    assert "labels are made up" in plan.notes


def test_progress_names_every_execution_in_order():
    seen = []
    plan = tune(target=64, progress=seen.append)
    begins = [step for step in seen if step.trial is None]
    assert [step.micro_batch for step in begins] == [trial.micro_batch for trial in plan.trials]
    assert [step.executions for step in begins] == list(range(plan.executions))
    assert [step.trial for step in seen if step.trial is not None] == list(plan.trials)


@settings(max_examples=12, deadline=None)
@given(target=st.integers(1, 5000), world_size=st.integers(1, 9))
def test_any_target_is_met_exactly_on_any_number_of_gpus_or_refused(target, world_size):
    workload = Workload(
        model=nn.Linear(8, 2), batch=lambda n: torch.zeros(n, 8), sample_limit=1 + target % 37
    )
    try:
        plan = autobatch.tune(workload, target=target, world_size=world_size, gpu=SMALL_CARD)
    except UsageError as error:
        # fewer samples than GPUs, or one sample at a time that GPUs cannot share evenly
        assert target < world_size or (workload.sample_limit == 1 and target % world_size)
        assert str(target) in str(error)
        return
    windows = plan.split.windows
    sizes = {size for window in windows for size in window}
    assert sum(map(sum, windows)) == plan.effective_batch == target
    assert len(windows) == plan.world_size == world_size
    assert {len(window) for window in windows} == {plan.accumulation_steps}
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) == plan.micro_batch <= plan.ceiling_at_least <= workload.sample_limit
    assert plan.footprint.micro_batch == plan.micro_batch


def test_a_prime_target_is_met_by_sizes_that_differ_by_one():
    workload = Workload(model=nn.Linear(8, 2), batch=lambda n: torch.zeros(n, 8), sample_limit=100)
    plan = autobatch.tune(workload, target=257, gpu=SMALL_CARD)
    assert plan.split.windows == ((86, 86, 85),)


# What is refused, and how


class Refusing(nn.Linear):
    def forward(self, x):
        return self.helper(x)

    def helper(self, x):
        raise KeyError("no such\nfeature")


@pytest.mark.parametrize("target", [0, -1, 2.5, True])
def test_a_target_that_is_no_positive_whole_number_is_a_usage_error(target):
    with pytest.raises(UsageError, match="target effective batch is") as caught:
        tune(target=target)
    assert repr(target) in one_line(caught)


@pytest.mark.parametrize("target", ["256", None])
def test_a_target_that_is_no_number_is_a_usage_error(target):
    with pytest.raises(UsageError, match="target effective batch is") as caught:
        tune(target=target)
    assert repr(target) in one_line(caught)


@pytest.mark.parametrize("world_size", [0, -2, 1.5])
def test_a_world_without_gpus_is_a_usage_error(world_size):
    with pytest.raises(UsageError, match="world size is") as caught:
        tune(world_size=world_size)
    one_line(caught)


def test_fewer_samples_than_gpus_is_a_usage_error():
    with pytest.raises(UsageError, match="leaves some of 8 GPUs without a sample"):
        tune(target=7, world_size=8)


def test_an_unknown_gpu_is_refused_with_the_nearest_names():
    with pytest.raises(UnknownGpuError, match="did you mean") as caught:
        tune(gpu="a100-40g8")
    assert "a100-40gb" in one_line(caught)


@pytest.mark.parametrize("gpu", [7, 1.5, ["a100-40gb"]])
def test_a_gpu_that_is_neither_name_nor_spec_is_a_usage_error(gpu):
    with pytest.raises(UsageError, match="gpu is") as caught:
        tune(gpu=gpu)
    one_line(caught)


def test_no_gpu_in_the_machine_and_none_named_says_how_to_name_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(NoGpuError, match='gpu="a100-40gb"') as caught:
        tune(gpu=None)
    assert one_line(caught)
    with pytest.raises(NoGpuError):
        autobatch.predict(perceptron(), micro_batch=1, sample=SAMPLE)


def test_inputs_that_cannot_be_inferred_are_asked_for():
    class Opaque(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(3))

        def forward(self, left, right, *, mask):
            return (left * self.weight + right) * mask

    with pytest.raises(SampleError, match="sample=") as caught:
        tune(Opaque(), sample=None, loss=None)
    assert "Opaque" in one_line(caught)


@pytest.mark.parametrize("sample", [torch.tensor(3.0), {"scale": 2.0}, "text", ()])
def test_a_sample_without_batch_dimension_is_refused(sample):
    with pytest.raises(SampleError, match="batch dimension") as caught:
        tune(sample=sample)
    one_line(caught)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda model, batch: model(batch[0]), r"the loss has shape \(2, 10\), not one value"),
        (lambda model, batch: 0.7, "the loss is a float, not a tensor"),
        (lambda model, batch: None, "the loss is a NoneType, not a tensor"),
        (lambda model, batch: model(batch[0]).sum().detach(), "the loss has no gradient"),
        (lambda model, batch: model(batch[0]).argmax(1).sum(), "the loss has no gradient"),
    ],
)
def test_a_loss_that_cannot_be_trained_on_is_a_workload_error(loss, message):
    with pytest.raises(WorkloadError, match=message) as caught:
        tune(loss=loss)
    one_line(caught)


def test_a_model_that_raises_keeps_its_own_traceback():
    with pytest.raises(WorkloadError, match="Refusing failed at micro-batch 2: KeyError") as caught:
        tune(Refusing(64, 10))
    one_line(caught)
    cause = caught.value.__cause__
    assert isinstance(cause, KeyError)
    frames = [frame.name for frame in traceback.extract_tb(cause.__traceback__)]
    assert frames[-2:] == ["forward", "helper"]


def test_a_shape_mistake_names_the_models_own_line():
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(33, 10))
    with pytest.raises(WorkloadError, match="Sequential failed at micro-batch 2") as caught:
        tune(model)
    frames = traceback.extract_tb(caught.value.__cause__.__traceback__)
    assert any(frame.filename.endswith("linear.py") for frame in frames)


def test_a_model_with_nothing_to_train_is_a_workload_error():
    model = perceptron().requires_grad_(False)
    with pytest.raises(WorkloadError, match="no parameter requires a gradient") as caught:
        tune(model)
    one_line(caught)


def test_a_model_that_does_not_fit_says_how_much_is_short_and_what_would_help():
    card = GpuSpec(name="tiny-card", capacity_bytes=40 * MIB)
    with pytest.raises(DoesNotFitError, match="not even micro-batch 1 fits on tiny-card") as caught:
        tune(gpu=card)
    message = one_line(caught)
    needed = autobatch.predict(
        perceptron(),
        micro_batch=1,
        accumulation_steps=2,
        sample=SAMPLE,
        loss=cross_entropy,
        gpu=card,
    ).peak_reserved_bytes
    assert f"({needed - int(40 * MIB * (1 - SIMULATED_HEADROOM)):,} bytes) short" in message
    assert 'autocast="bf16"' in message and "a larger GPU (" in message
    assert caught.value.exit_code == 3


def test_a_model_that_cannot_run_one_sample_and_does_not_fit_two_does_not_fit():
    model = nn.Sequential(nn.Linear(64, 128), nn.BatchNorm1d(128), nn.Linear(128, 10))
    with pytest.raises(DoesNotFitError, match="micro-batch 2"):
        tune(model, gpu=GpuSpec(name="tiny-card", capacity_bytes=3 * MIB))


@pytest.mark.parametrize(
    ("option", "value"),
    [("clip_norm", "a"), ("clip_norm", 0), ("loss", 3), ("optimizer", "adamww"), ("headroom", "x")],
)
def test_an_option_of_the_wrong_kind_is_a_usage_error(option, value):
    with pytest.raises(UsageError, match=f"{option} is {value!r}") as caught:
        tune(**{option: value})
    one_line(caught)


@pytest.mark.parametrize("headroom", [-0.01, 1, 1.0, 7, float("nan")])
def test_headroom_outside_of_zero_to_one_is_a_usage_error(headroom):
    with pytest.raises(UsageError, match="headroom is") as caught:
        tune(headroom=headroom)
    one_line(caught)


@pytest.mark.parametrize("autocast", ["fp8", "float16", ""])
def test_an_unknown_autocast_names_the_known_ones(autocast):
    with pytest.raises(UsageError, match="use one of bf16, fp16, or None") as caught:
        tune(autocast=autocast)
    one_line(caught)


@pytest.mark.parametrize("clip_norm", [0, -1.0, float("nan"), float("inf")])
def test_a_clip_norm_that_is_not_positive_and_finite_is_a_usage_error(clip_norm, tmp_path):
    with pytest.raises(UsageError, match="use a positive norm"):
        tune(clip_norm=clip_norm, cache=tmp_path / "plans.json")
    with pytest.raises(UsageError, match="use a positive norm"):
        Workload(model=nn.Linear(1, 1), batch=lambda n: None, clip_norm=clip_norm)


@pytest.mark.parametrize("time_limit", [0, -1.0, float("nan"), float("inf"), "5"])
def test_a_time_limit_that_cannot_pass_is_a_usage_error(time_limit):
    with pytest.raises(UsageError, match=r"time_limit is .*: give seconds") as caught:
        tune(time_limit=time_limit, isolate=True)
    one_line(caught)


def test_what_is_no_module_is_a_usage_error():
    with pytest.raises(UsageError, match=r"model is a str: pass an nn\.Module"):
        tune("resnet50")


@pytest.mark.parametrize(
    "sizes", [{"micro_batch": 0}, {"micro_batch": 1.5}, {"micro_batch": 2, "accumulation_steps": 0}]
)
def test_predict_refuses_sizes_that_are_no_positive_whole_numbers(sizes):
    with pytest.raises(UsageError, match="use a whole number of at least 1"):
        autobatch.predict(perceptron(), sample=SAMPLE, gpu=SMALL_CARD, **sizes)


def test_predict_takes_as_long_for_any_micro_batch_and_refuses_what_has_no_addresses():
    def predicted(micro_batch):
        return autobatch.predict(
            perceptron(), sample=SAMPLE, gpu=SMALL_CARD, micro_batch=micro_batch
        )

    few, many = predicted(10**6), predicted(10**12)
    of_samples = few.activations_bytes + few.inputs_bytes
    assert many.activations_bytes + many.inputs_bytes == pytest.approx(10**6 * of_samples)
    for micro_batch in (10**17, 10**30):
        with pytest.raises(UsageError, match="more memory than there are addresses") as caught:
            predicted(micro_batch)
        one_line(caught)


def test_a_batch_of_more_bytes_than_there_are_addresses_is_refused_after_its_run():
    def sized(model, batch):
        return model(batch.expand(-1, 2**20)[:, :1024]).mean() + batch.repeat(1, 2**24).mean()

    with pytest.raises(UsageError, match="more memory than there are addresses"):
        autobatch.predict(
            nn.Linear(1024, 1), sample=torch.zeros(2, 1), loss=sized, gpu=SMALL_CARD,
            micro_batch=2**36,
        )  # fmt: skip


# The user's objects stay as they are


def test_a_run_with_a_seed_gives_the_same_losses_with_and_without_tuning():
    def losses(tuned):
        model, optimizer, _ = trained()
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        if tuned:
            autobatch.tune(
                model,
                target=64,
                sample=TOKENS[:5],
                optimizer=optimizer,
                loss=lm_loss,
                gpu=SMALL_CARD,
            )
        values = []
        for _ in range(3):
            loss = lm_loss(model, TOKENS)
            loss.backward()
            optimizer.step()
            values.append(loss.item())
        return values

    assert losses(tuned=True) == losses(tuned=False)


def test_predict_leaves_a_meta_model_on_meta():
    with torch.device("meta"):
        model = perceptron()
    footprint = autobatch.predict(
        model, micro_batch=8, sample=SAMPLE, loss=cross_entropy, gpu="t4", optimizer=torch.optim.SGD
    )
    assert footprint.parameters_bytes == 2_175_498 * 4
    assert all(p.is_meta and p.grad is None for p in model.parameters())


# The package itself


def test_a_name_that_there_is_not_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'tuen'"):
        autobatch.tuen  # noqa: B018


HEAVY = ["optuna", "pandas", "matplotlib", "rich", "pynvml", "transformers", "timm", "lightning"]


def loaded_by(statement, *, after="pass"):
    """Return which heavy packages a statement loads in a fresh process."""
    code = f"import sys; {after}; before = {{*sys.modules}}; {statement}"
    code += f"; print(*sorted(({{*sys.modules}} - before) & {{'torch', *{HEAVY}}}))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_importing_the_package_loads_nothing_heavy():
    assert loaded_by("import autobatch") == ""


@pytest.mark.slow
def test_tuning_needs_no_package_but_torch():
    assert loaded_by("import autobatch; autobatch.tune, autobatch.Plan", after="import torch") == ""


def test_a_planned_window_fits_where_a_larger_one_does_and_it_would_not():
    """What is kept takes segments of its own at some sizes only."""
    kept = []

    def loss(model, batch):
        output = model(batch)
        kept.append(output.detach()[:5].clone())
        return output.square().mean()

    plan = autobatch.tune(
        nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU()),
        target=100_000,
        sample=torch.zeros(4, 3, 64, 64),
        loss=loss,
        gpu="2GiB",
        cache=False,
    )
    largest = split(100_000, ceiling=plan.ceiling).micro_batch
    assert plan.micro_batch < largest  # or this tests nothing
    assert plan.footprint.peak_reserved_bytes <= plan.budget_bytes


def test_a_data_set_of_as_many_samples_as_are_planned_at_once_is_tuned():
    data = [(torch.zeros(16), torch.tensor(0)) for _ in range(2)]
    plan = autobatch.tune(
        nn.Linear(16, 4),
        target=2,
        sample=TensorDataset(*map(torch.stack, zip(*data, strict=True))),
        loss=lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1]),
        gpu="t4",
        cache=False,
    )
    assert (plan.micro_batch, plan.accumulation_steps) == (2, 1)


@pytest.mark.parametrize(("target", "whole"), [(133, False), (100, True)])
def test_a_target_that_does_not_fit_at_once_is_split_also_below_the_ceiling(
    target: int, whole: bool
) -> None:
    model = nn.Sequential(
        *[nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU()],
        *[nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)],
    )
    sample = torch.zeros(4, 3, 32, 32), torch.zeros(4, dtype=torch.long)
    card = GpuSpec(name="card", capacity_bytes=260 * MIB, compute_capability=(8, 0))
    options = {"sample": sample, "loss": nn.CrossEntropyLoss(), "optimizer": "sgd", "gpu": card}
    plan = autobatch.tune(model, target=target, **options)
    assert plan.ceiling is not None
    assert plan.footprint.peak_reserved_bytes <= plan.budget_bytes
    if plan.ceiling < target:
        pytest.skip("convolutions of this PyTorch take other scratch memory")
    assert (plan.accumulation_steps == 1) == whole


def test_a_model_of_pairs_is_said_to_run_at_other_sizes() -> None:
    class Pairs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            first, second = self.layer(x).view(2, -1, 8)
            return (first - second).square().mean()

    with pytest.raises(WorkloadError, match=r"micro-batch 2 ran: .*count groups of that size"):
        autobatch.tune(Pairs(), sample=torch.zeros(4, 8), target=64, gpu="t4")
