from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

import autobatch
from autobatch.errors import DoesNotFitError, UsageError
from autobatch.records.split import split
from tests.support.plans import example_plan, ragged_plan

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")

from autobatch.exports.transformers import training_arguments  # noqa: E402
from autobatch.integrations.transformers import AutobatchCallback, tune_trainer  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")

# its name until transformers 5
_FIELDS = transformers.TrainingArguments.__dataclass_fields__
RECOMPUTE = next(
    name for name in ("activation_checkpointing", "gradient_checkpointing") if name in _FIELDS
)
CARD = autobatch.GpuSpec(name="tiny-card", capacity_bytes=32 * 2**20)
LARGER = autobatch.GpuSpec(name="larger-card", capacity_bytes=300 * 2**20)


class Texts(Dataset[dict[str, Tensor]]):
    """Sequences of 16 tokens, of which different numbers count."""

    def __init__(self, samples: int = 100) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = (torch.arange(16) * 7 + index) % 1000
        labels = tokens.clone()
        labels[: index % 5] = -100
        return {"input_ids": tokens, "labels": labels}


def model() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=2,
        n_head=2,
        n_embd=32,
        n_positions=32,
        vocab_size=1000,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return transformers.GPT2LMHeadModel(config)


class Counting(transformers.Trainer):
    """Counts the samples of each update, and keeps each update's rate."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.waiting = 0
        self.updates: list[int] = []
        self.rates: list[float] = []

    def training_step(self, module: Any, inputs: Any, *rest: Any) -> Tensor:
        self.waiting += len(inputs["input_ids"])
        if self.accelerator.sync_gradients:
            self.updates.append(self.waiting)
            self.waiting = 0
            self.rates.append(self.optimizer.param_groups[0]["lr"])
        return super().training_step(module, inputs, *rest)


def trainer(folder: Path, *, samples: int = 96, callbacks: Any = None, **options: Any) -> Counting:
    arguments = {
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "num_train_epochs": 2,
        "learning_rate": 1.0,
    } | options
    return Counting(
        model(),
        transformers.TrainingArguments(output_dir=str(folder), **arguments),
        train_dataset=Texts(samples),
        callbacks=callbacks,
    )


def planned(target: int, ceiling: int) -> autobatch.Plan:
    facts = replace(example_plan().model, autocast=None)
    return replace(
        example_plan(),
        split=split(target, ceiling=ceiling),
        ceiling_at_least=ceiling,
        model=facts,
    )


def test_every_update_gets_exactly_the_target_and_the_schedule_ends_with_the_last(
    tmp_path: Path,
) -> None:
    run = trainer(tmp_path)
    plan = tune_trainer(run, target=24, gpu=CARD)
    assert plan.accumulation_steps > 1 and plan.effective_batch == 24
    assert (plan.model.optimizer, plan.model.clip_norm) == ("AdamW", 1.0)
    assert run.args.per_device_train_batch_size == plan.micro_batch
    assert run.args.gradient_accumulation_steps == plan.accumulation_steps
    assert run.optimizer is None and run.lr_scheduler is None  # made by train(), from the sizes
    run.train()
    assert run.updates == [24] * 8
    assert run.rates == pytest.approx([1 - step / 8 for step in range(8)])


@pytest.mark.slow
def test_the_plan_by_itself_gives_the_same_updates(tmp_path: Path) -> None:
    plan = planned(24, ceiling=10)
    run = trainer(tmp_path, callbacks=[AutobatchCallback(plan)], **plan.to_training_arguments())
    run.train()
    assert (plan.micro_batch, plan.accumulation_steps) == (8, 3)
    assert run.updates == [24] * 8


def test_gradients_are_those_of_the_whole_batch_in_a_partial_window_too(tmp_path: Path) -> None:
    """Trainer divides by the tokens of a window: 40 samples are windows of 24 and 16."""
    gradients: list[Tensor] = []

    class Keeping(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
            gradients.append(model.lm_head.weight.grad.clone())

    for sizes in (planned(24, ceiling=10), planned(24, ceiling=24)):
        run = trainer(
            tmp_path,
            samples=40,
            callbacks=[Keeping()],
            num_train_epochs=1,
            **sizes.to_training_arguments() | {"max_grad_norm": 0.0, "learning_rate": 0.0},
        )
        run.train()
        assert run.updates == [24, 16]
    for accumulated, at_once in zip(gradients[:2], gradients[2:], strict=True):
        torch.testing.assert_close(accumulated, at_once, rtol=1e-4, atol=1e-6)


def test_training_arguments_say_what_was_planned() -> None:
    assert example_plan().to_training_arguments() == {
        "per_device_train_batch_size": 64,
        "gradient_accumulation_steps": 4,
        "max_grad_norm": 1.0,
        "bf16": True,
        "fp16": False,
        "average_tokens_across_devices": True,
        "optim": "adamw_torch_fused",
    }
    unclipped = ragged_plan(256, ((64,) * 4,), clip_norm=None, optimizer="SGD", autocast="fp16")
    made = unclipped.to_training_arguments()
    assert (made["max_grad_norm"], made["bf16"], made["fp16"]) == (0.0, False, True)
    assert "optim" not in made  # its momentum is not known
    with pytest.raises(UsageError, match="one size"):
        training_arguments(ragged_plan(257, ((86, 86, 85),)))


@pytest.mark.slow
def test_a_run_that_resumes_takes_the_plan_of_its_checkpoint_and_probes_nothing(
    tmp_path: Path,
) -> None:
    options = {"save_strategy": "steps", "save_steps": 3, "save_total_limit": None}
    first = trainer(tmp_path, **options)
    plan = tune_trainer(first, target=24, gpu=CARD)
    first.train()
    checkpoint = tmp_path / "checkpoint-3"

    again = trainer(tmp_path, **options)
    # it would find other sizes, were it to look
    kept = tune_trainer(again, target=24, gpu="cuda:7", resume_from_checkpoint=str(checkpoint))
    assert (kept.split, kept.footprint, kept.trials) == (plan.split, plan.footprint, plan.trials)
    again.train(resume_from_checkpoint=str(checkpoint))
    assert again.updates == first.updates[3:]
    for name, value in again.model.state_dict().items():
        assert torch.equal(value, first.model.state_dict()[name])

    with pytest.raises(UsageError, match=r"effective batch of 24 on 1 ranks.* asks for 48"):
        tune_trainer(trainer(tmp_path), target=48, gpu=CARD, resume_from_checkpoint=True)
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["AutobatchCallback"]["args"]["plan"]["answer"] == {
        "micro_batch": plan.micro_batch,
        "accumulation_steps": plan.accumulation_steps,
        "world_size": 1,
        "effective_batch": 24,
        "ceiling": plan.ceiling,
    }


@pytest.mark.slow
def test_resuming_with_other_sizes_than_the_checkpoint_is_refused(tmp_path: Path) -> None:
    first = trainer(tmp_path, save_strategy="steps", save_steps=3)
    tune_trainer(first, target=24, gpu=CARD)
    first.train()
    again = trainer(tmp_path)
    tune_trainer(again, target=24, gpu=LARGER)
    with pytest.raises(UsageError, match="resume_from_checkpoint"):
        again.train(resume_from_checkpoint=True)


def test_a_checkpoint_without_a_plan_is_said_to_have_none(tmp_path: Path) -> None:
    trainer(tmp_path, save_strategy="steps", save_steps=3).train()
    with pytest.raises(UsageError, match="holds no plan"):
        tune_trainer(trainer(tmp_path), target=24, gpu=CARD, resume_from_checkpoint=True)
    with pytest.raises(UsageError, match="no checkpoint in"):
        tune_trainer(trainer(tmp_path / "new"), target=24, resume_from_checkpoint=True)


def test_the_callback_alone_notices_arguments_of_another_plan(tmp_path: Path) -> None:
    callback = AutobatchCallback(planned(24, ceiling=10))
    run = trainer(tmp_path, callbacks=[callback], per_device_train_batch_size=24)
    with pytest.raises(UsageError, match=r"micro-batch 24 × 1 step .* micro-batch 8 × 3 steps"):
        run.train()
    with pytest.raises(UsageError, match="one size"):
        AutobatchCallback(ragged_plan(257, ((86, 86, 85),)))


def test_trainer_can_make_the_callback_anew_from_a_checkpoint() -> None:
    callback = AutobatchCallback(example_plan())
    state = json.loads(json.dumps(callback.state()))
    again = AutobatchCallback.from_state(state)
    assert again.plan.split == callback.plan.split
    assert again.state() == callback.state()


@pytest.mark.slow
def test_where_nothing_fits_the_model_and_trainer_are_as_before(tmp_path: Path) -> None:
    run = trainer(tmp_path, **{RECOMPUTE: True})
    weights = copy.deepcopy(run.model.state_dict())
    state = torch.random.get_rng_state()
    smallest = autobatch.GpuSpec(name="smallest", capacity_bytes=2**20)
    with pytest.raises(DoesNotFitError):
        tune_trainer(run, target=24, gpu=smallest)
    assert run.args.per_device_train_batch_size == 8  # transformers' default
    assert run.args.gradient_accumulation_steps == 1
    assert run.optimizer is None and not getattr(run.model, f"is_{RECOMPUTE}")
    assert torch.equal(torch.random.get_rng_state(), state)
    for name, value in run.model.state_dict().items():
        assert torch.equal(value, weights[name])


@pytest.mark.slow
def test_what_train_switches_on_is_probed(tmp_path: Path) -> None:
    """Recomputing activations, and the fp32 copy of logits that accelerate makes under autocast."""
    card = {"target": 4, "gpu": "t4", "cache": False}
    plain = tune_trainer(trainer(tmp_path), **card).footprint
    recomputed = tune_trainer(trainer(tmp_path, **{RECOMPUTE: True}), **card).footprint
    assert recomputed.activations_bytes < plain.activations_bytes
    half = tune_trainer(trainer(tmp_path, bf16=True), **card)
    assert half.model.autocast == "bf16"


@pytest.mark.slow
def test_the_inputs_of_a_whole_window_find_room(tmp_path: Path) -> None:
    class Wide(Texts):
        """Carries a mask of 128 KiB, which the model does not keep."""

        def __getitem__(self, index: int) -> dict[str, Tensor]:
            return {**super().__getitem__(index), "mask": torch.zeros(32 * 1024)}

    class Masked(transformers.GPT2LMHeadModel):
        def forward(self, input_ids: Tensor, labels: Tensor, mask: Tensor, **more: Any) -> Any:
            return super().forward(input_ids=input_ids, labels=labels, **more)

    def widened() -> Any:
        args = trainer(tmp_path).args
        return Counting(Masked(model().config), args, train_dataset=Wide(256))

    card = autobatch.GpuSpec(name="card", capacity_bytes=64 * 2**20)
    few, many = (tune_trainer(widened(), target=n, gpu=card) for n in (16, 128))
    waiting_bytes = (128 - many.micro_batch) * 128 * 1024
    assert any("inputs of a whole window" in note for note in many.notes)
    assert many.footprint.peak_reserved_bytes + waiting_bytes <= few.budget_bytes


@pytest.mark.slow
def test_the_same_trainer_is_answered_from_a_cache_and_one_with_its_own_loss_is_not(
    tmp_path: Path,
) -> None:
    def is_cached(plan: autobatch.Plan) -> bool:
        return any("answered from" in note for note in plan.notes)

    asked = {"target": 24, "gpu": CARD, "cache": tmp_path / "plan.json"}
    assert not is_cached(tune_trainer(trainer(tmp_path), **asked))
    assert is_cached(tune_trainer(trainer(tmp_path), **asked))

    class Own(Counting):
        def compute_loss(self, *args: Any, **options: Any) -> Any:
            return super().compute_loss(*args, **options) * 2

    def own() -> Any:
        base = trainer(tmp_path)
        return Own(model(), base.args, train_dataset=Texts())

    assert not is_cached(tune_trainer(own(), **asked))


def test_what_is_not_simulated_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="auto_find_batch_size"):
        tune_trainer(trainer(tmp_path, auto_find_batch_size=True), target=24, gpu=CARD)


@pytest.mark.slow
def test_a_target_that_needs_several_sizes_is_replaced_only_when_asked(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"effective batch of 47 needs sizes"):
        tune_trainer(trainer(tmp_path), target=47, gpu=CARD)
    run = trainer(tmp_path, num_train_epochs=1, save_strategy="steps", save_steps=1)
    plan = tune_trainer(run, target=47, gpu=CARD, nearest=True)
    assert plan.target in (46, 48)
    assert any(f"{plan.target} in place of the 47" in note for note in plan.notes)
    run.train()
    assert run.updates[0] == plan.target
    again = tune_trainer(trainer(tmp_path), target=47, gpu="cuda:7", resume_from_checkpoint=True)
    assert again.split == plan.split


class Distilled(transformers.Trainer):
    """Compares with a teacher that the trainer holds, and with the trainer's own model."""

    teacher: Any

    def compute_loss(self, module: Any, inputs: Any, **options: Any) -> Tensor:
        tokens = inputs["input_ids"]
        with torch.no_grad():
            assert self.model is module and next(self.teacher.parameters()).is_cuda
            wanted = self.teacher(input_ids=tokens).logits + self.model(input_ids=tokens).logits
        return (module(input_ids=tokens).logits - wanted).square().mean()


def test_modules_that_a_trainer_holds_are_copied_with_it(tmp_path: Path) -> None:
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True
    )
    run = Distilled(model(), arguments, train_dataset=Texts())
    run.teacher = teacher = model()
    own = run.model
    plan = tune_trainer(run, target=8, gpu="t4")
    assert not [note for note in (*plan.warnings, *plan.notes) if "on the CPU" in note]
    weights = sum(p.nbytes for p in teacher.parameters())
    assert plan.footprint.other_bytes + plan.footprint.parameters_bytes >= 2 * weights
    assert run.model is own and run.teacher is teacher
    assert type(next(teacher.parameters())) is torch.nn.Parameter


def test_the_older_name_of_the_module_has_the_same_functions():
    from autobatch.integrations import huggingface

    assert huggingface.tune_trainer is tune_trainer
    assert huggingface.AutobatchCallback is AutobatchCallback
    assert huggingface.training_arguments is training_arguments
