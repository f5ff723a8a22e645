"""Windows of several micro-batches have the gradient of one batch, whatever the trainer's loss.

The truth of each test is the same trainer with all samples in one micro-batch, in float64.
"""

from __future__ import annotations

import contextlib
import copy
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

import autobatch
from autobatch.errors import AutobatchWarning, UsageError
from autobatch.records.split import split

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")

from autobatch.integrations.transformers import AutobatchCallback, tune_trainer  # noqa: E402
from autobatch.integrations.transformers_scale import settle_scaling  # noqa: E402
from tests.integrations.test_transformers import planned  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
    pytest.mark.skipif(
        not hasattr(transformers.Trainer, "loss_is_scaled_for_ga"),
        reason="this transformers cannot be told how a loss is scaled",
    ),
]

SAMPLES, WORDS, LENGTH = 8, 11, 6


class Words(Dataset[dict[str, Any]]):
    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids = torch.randint(0, WORDS, (LENGTH,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids.roll(1)}


class Net(nn.Module):
    """Takes the count, and divides by it."""

    dropout = 0.0

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(WORDS, 4)
        self.norm = nn.BatchNorm1d(4, track_running_stats=True)
        self.head = nn.Linear(4, WORDS)
        self.calls = 0
        self.double()

    def logits(self, input_ids: Tensor) -> Tensor:
        self.calls += 1
        hidden = F.dropout(self.embed(input_ids), self.dropout, self.training)
        self.norm(hidden.detach().flatten(0, 1))  # only its statistics
        return self.head(hidden)

    def forward(self, input_ids: Tensor, labels: Any = None, **more: Any) -> dict[str, Tensor]:
        logits = self.logits(input_ids)
        if labels is None:
            return {"logits": logits}
        return {"loss": self.loss(logits, labels, **more), "logits": logits}

    def loss(self, logits: Tensor, labels: Tensor, **more: Any) -> Tensor:
        return _summed(logits, labels) / more.get("num_items_in_batch", labels.numel())


def _summed(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")


def _mean(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


class LeavesTheCountAside(Net):
    def loss(self, logits: Tensor, labels: Tensor, **more: Any) -> Tensor:
        return _mean(logits, labels)


class WithAuxiliaryLoss(Net):
    """As mixtures of experts: one part is divided by the count, the other is not."""

    def loss(self, logits: Tensor, labels: Tensor, **more: Any) -> Tensor:
        return super().loss(logits, labels, **more) + 0.01 * logits.square().mean()


class NamesTheCountOtherwise(Net):
    def forward(self, input_ids: Tensor, labels: Any = None, n: Any = None) -> Any:
        logits = self.logits(input_ids)
        if labels is None:
            return {"logits": logits}
        return {"loss": _summed(logits, labels) / (n or labels.numel()), "logits": logits}


class Wrapper(nn.Module):
    """As adapters wrap a model: whatever is passed goes on."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **options: Any) -> Any:
        return self.inner(*args, **options)


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"n_layer": 1, "n_head": 1, "n_embd": 4, "n_positions": LENGTH, "vocab_size": WORDS}
    ends = {"bos_token_id": None, "eos_token_id": None}
    drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    config = transformers.GPT2Config(**sizes, **ends, **drops)
    net: nn.Module = transformers.GPT2LMHeadModel(config).double()
    return net


class Dropping(Net):
    dropout = 0.5


class OwnMean(transformers.Trainer):
    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs.pop("labels")
        return _mean(model(**inputs)["logits"], labels)


class OwnSum(transformers.Trainer):
    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs.pop("labels")
        return _summed(model(**inputs)["logits"], labels) / num_items_in_batch


class PassesTheCount(transformers.Trainer):
    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        return model(**inputs, n=num_items_in_batch)["loss"]


class DividesByTheWindow(OwnMean):
    """As trainers of TRL do."""

    def compute_loss(self, *args: Any, **options: Any) -> Any:
        return super().compute_loss(*args, **options) / self.current_gradient_accumulation_steps


class DividesByTheArguments(OwnMean):
    def compute_loss(self, *args: Any, **options: Any) -> Any:
        return super().compute_loss(*args, **options) / self.args.gradient_accumulation_steps


class OwnStep(OwnMean):
    """Calls backward by itself, and divides by the steps itself."""

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        model.train()
        loss = self.compute_loss(model, self._prepare_inputs(inputs))
        loss = loss / self.current_gradient_accumulation_steps
        loss.backward()
        return loss.detach()


class StepWithoutSteps(OwnMean):
    """As `OwnStep`, but divides by nothing."""

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        model.train()
        loss = self.compute_loss(model, self._prepare_inputs(inputs))
        self.accelerator.backward(loss)
        return loss.detach()


class OfValueZero(OwnMean):
    """As policy gradients: the value is zero, the gradient is not."""

    def compute_loss(self, *args: Any, **options: Any) -> Any:
        loss = super().compute_loss(*args, **options)
        return loss - loss.detach()


class HalfAndHalf(transformers.Trainer):
    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs.pop("labels")
        logits = model(**inputs)["logits"]
        return _summed(logits, labels) / num_items_in_batch + _mean(logits, labels)


def func_mean(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    return _mean(outputs["logits"], labels)


def func_sum(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    return _summed(outputs["logits"], labels) / num_items_in_batch


def func_for_some(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """Divides by the count where the first label is even."""
    choose = func_sum if labels[0, 0] % 2 else func_mean
    return choose(outputs, labels, num_items_in_batch)


class Keep(transformers.TrainerCallback):
    """Keeps the gradients of each update."""

    def __init__(self) -> None:
        self.updates: list[Tensor] = []

    def on_pre_optimizer_step(self, *_: Any, model: Any, **__: Any) -> None:
        grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        self.updates.append(torch.cat(grads))


def made(
    folder: Path, kind: Any, net: nn.Module, *, size: int, data: Any = None, **options: Any
) -> tuple[Any, Keep]:
    keep, func = Keep(), options.pop("compute_loss_func", None)
    arguments = {
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_strategy": "no",
        "learning_rate": 0.0,
        "max_grad_norm": 0.0,
        "max_steps": 1,
        "remove_unused_columns": False,
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": SAMPLES // size,
    } | options
    trainer = kind(
        net,
        transformers.TrainingArguments(output_dir=str(folder), **arguments),
        train_dataset=Words() if data is None else data,
        compute_loss_func=func,
        callbacks=[keep],
    )
    return trainer, keep


def trained(
    folder: Path, kind: Any, net: Callable[[], nn.Module], **options: Any
) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Return the gradient of all samples at once, that of 4 × 2, and what the latter warned of."""
    whole, kept = made(folder, kind, net(), size=SAMPLES, **options)
    whole.train()
    parts, accumulated = made(folder, kind, net(), size=2, **options)
    callback = AutobatchCallback(planned(SAMPLES, ceiling=2))
    parts.add_callback(callback)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", AutobatchWarning)
        parts.train()
    warned = tuple(str(w.message) for w in caught if w.category is AutobatchWarning)
    assert set(warned) <= set(callback.plan.warnings)
    return kept.updates[0], accumulated.updates[0], warned


def assert_equal(one: Tensor, other: Tensor) -> None:
    assert one.dtype == torch.float64 and one.norm() > 0
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "net", "options"),
    [
        (transformers.Trainer, Net, {}),
        (transformers.Trainer, lambda: Wrapper(Net()), {}),
        (transformers.Trainer, gpt2, {}),
        (transformers.Trainer, gpt2, {"label_smoothing_factor": 0.1}),
        (transformers.Trainer, Net, {"compute_loss_func": func_sum}),
        (OwnSum, Net, {}),
        (DividesByTheWindow, Net, {}),
        (DividesByTheArguments, Net, {}),
        (OwnStep, Net, {}),
    ],
)
def test_a_loss_that_is_scaled_already_is_left_as_it_is(
    tmp_path: Path, kind: Any, net: Any, options: dict[str, Any]
) -> None:
    whole, accumulated, notes = trained(tmp_path, kind, net, **options)
    assert_equal(accumulated, whole)
    assert not [note for note in notes if "was set on the trainer" in note]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "net", "options"),
    [
        (transformers.Trainer, LeavesTheCountAside, {}),
        (transformers.Trainer, lambda: Wrapper(LeavesTheCountAside()), {}),
        (transformers.Trainer, Net, {"compute_loss_func": func_mean}),
        (OwnMean, Net, {}),
        (OwnMean, lambda: Wrapper(Net()), {}),
        (OfValueZero, Net, {}),
    ],
)
def test_trainer_is_told_to_divide_a_loss_that_leaves_the_count_aside(
    tmp_path: Path, kind: Any, net: Any, options: dict[str, Any]
) -> None:
    whole, accumulated, notes = trained(tmp_path, kind, net, **options)
    assert_equal(accumulated, whole)
    (note,) = [note for note in notes if "num_items_in_batch" in note]
    assert "2 times its gradient" in note and "loss_is_scaled_for_ga=False was set" in note


@pytest.mark.parametrize(
    ("kind", "net"), [(PassesTheCount, NamesTheCountOtherwise), (OwnStep, LeavesTheCountAside)]
)
def test_a_count_of_another_name_and_a_step_of_its_own_are_tried_as_they_run(
    tmp_path: Path, kind: Any, net: Any
) -> None:
    whole, accumulated, _ = trained(tmp_path, kind, net)
    assert_equal(accumulated, whole)


@pytest.mark.slow
def test_trainer_is_told_not_to_divide_what_is_divided_twice(tmp_path: Path) -> None:
    whole, accumulated, notes = trained(tmp_path, DividesByTheWindow, NamesTheCountOtherwise)
    assert_equal(accumulated, whole)
    assert [note for note in notes if "0.5 times" in note and "loss_is_scaled_for_ga=True" in note]


@pytest.mark.slow
def test_a_part_that_is_not_divided_is_mended_by_keeping_the_count_from_the_model(
    tmp_path: Path,
) -> None:
    whole, accumulated, notes = trained(tmp_path, transformers.Trainer, WithAuxiliaryLoss)
    assert_equal(accumulated, whole)
    assert [note for note in notes if "model_accepts_loss_kwargs=False was set" in note]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "options", "cause"),
    [
        (HalfAndHalf, {}, "a part of the loss"),
        (StepWithoutSteps, {}, "divide its loss by self.current_gradient_accumulation_steps"),
        (transformers.Trainer, {"compute_loss_func": func_for_some}, "some batches"),
    ],
)
def test_what_no_setting_mends_is_refused_with_several_steps_and_noted_with_one(
    tmp_path: Path, kind: Any, options: dict[str, Any], cause: str
) -> None:
    trainer, _ = made(tmp_path, kind, Net(), size=2, **options)
    trainer.add_callback(AutobatchCallback(planned(SAMPLES, ceiling=2)))
    with pytest.raises(UsageError, match=rf"no setting of Trainer mends that: .*{cause}"):
        trainer.train()
    assert trainer.loss_is_scaled_for_ga is None and trainer.model_accepts_loss_kwargs
    scaling = settle_scaling(trainer, trainer.get_train_dataloader(), steps=1)
    assert cause in str(scaling.note)


@pytest.mark.slow
def test_a_loss_that_divides_by_the_arguments_is_said_to_under_scale_a_partial_window(
    tmp_path: Path,
) -> None:
    *_, notes = trained(tmp_path, DividesByTheArguments, Net)
    assert [n for n in notes if "args.gradient_accumulation_steps" in n and "0.5 times" in n]
    *_, notes = trained(tmp_path, DividesByTheWindow, Net)
    assert not [note for note in notes if "args.gradient_accumulation_steps" in note]


class Odd(OwnMean):
    """Another loss at each call, by a source of randomness that cannot be put back."""

    def compute_loss(self, *args: Any, **options: Any) -> Any:
        return super().compute_loss(*args, **options) * 10 ** random.SystemRandom().uniform(0, 100)


class Failing(OwnMean):
    def compute_loss(self, *args: Any, **options: Any) -> Any:
        raise KeyError("teacher_logits")


@pytest.mark.parametrize(("kind", "reason"), [(Odd, "each time"), (Failing, "teacher_logits")])
def test_a_loss_that_cannot_be_tried_is_a_warning(tmp_path: Path, kind: Any, reason: str) -> None:
    trainer, _ = made(tmp_path, kind, Net(), size=2)
    trainer.add_callback(AutobatchCallback(planned(SAMPLES, ceiling=2)))
    fails = pytest.raises(KeyError) if kind is Failing else contextlib.nullcontext()
    with fails, pytest.warns(AutobatchWarning, match=f"was not tried .*{reason}"):
        trainer.train()


def test_batches_without_gradients_are_left_out(tmp_path: Path) -> None:
    class Masked(Words):
        def __getitem__(self, index: int) -> dict[str, Any]:
            item = super().__getitem__(index)
            return item | {"labels": torch.full_like(item["labels"], -100)}

    trainer, _ = made(tmp_path, OwnMean, Net(), size=2, data=Masked())
    scaling = settle_scaling(trainer, trainer.get_train_dataloader(), steps=4)
    assert not scaling.is_known and "no batch gave a finite gradient" in str(scaling.note)


def test_a_stream_is_tried_too(tmp_path: Path) -> None:
    class Stream(IterableDataset[dict[str, Any]]):
        def __iter__(self) -> Any:
            return iter([Words()[index] for index in range(SAMPLES)])

    whole, accumulated, notes = trained(tmp_path, OwnMean, Net, data=Stream())
    assert_equal(accumulated, whole)
    assert [note for note in notes if "was set on the trainer" in note]


def test_nothing_of_the_users_is_changed_but_the_one_setting(tmp_path: Path) -> None:
    class Measuring(OwnMean):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self.metrics: dict[str, list[float]] = {"loss": []}
            self.teacher = Net()

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **options: Any) -> Any:
            with torch.no_grad():
                for parameter in self.teacher.parameters():
                    parameter.mul_(0.9)
            loss = super().compute_loss(model, inputs, *args, **options)
            self.metrics["loss"].append(float(loss))
            self.state.global_step += random.randint(1, 3)
            return loss

    net = Dropping().eval()
    net.embed.weight.grad = torch.ones_like(net.embed.weight)
    trainer, _ = made(tmp_path, Measuring, net, size=2)
    loader = trainer.get_train_dataloader()
    net.train(False)
    before = [copy.deepcopy(module.state_dict()) for module in (net, trainer.teacher)]
    attributes, arguments = dict(vars(trainer)), trainer.args.to_dict()
    states = torch.get_rng_state(), random.getstate()
    scaling = settle_scaling(trainer, loader, steps=4)
    assert scaling.is_known and "was set on the trainer" in str(scaling.note)
    assert vars(trainer) == attributes | {"loss_is_scaled_for_ga": False}
    assert trainer.args.to_dict() == arguments
    assert "backward" not in vars(trainer.accelerator)
    assert trainer.metrics == {"loss": []} and trainer.state.global_step == 0
    assert net.calls == 0 and not net.training
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert net.embed.weight.grad.eq(1).all() and net.head.weight.grad is None
    for module, kept in zip((net, trainer.teacher), before, strict=True):
        for name, value in module.state_dict().items():
            assert torch.equal(value, kept[name])


@pytest.mark.slow
def test_models_of_transformers_that_leave_the_count_aside_are_found(tmp_path: Path) -> None:
    """BERT's classifier takes keyword arguments, and gives its loss none of them."""

    class Labelled(Words):
        def __getitem__(self, index: int) -> dict[str, Any]:
            return super().__getitem__(index) | {"labels": index % 2}

    sizes = {"hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1}
    drops = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = transformers.BertConfig(vocab_size=WORDS, num_attention_heads=1, **sizes, **drops)

    def bert() -> Any:
        torch.manual_seed(0)
        return transformers.BertForSequenceClassification(config).double()

    whole, accumulated, notes = trained(tmp_path, transformers.Trainer, bert, data=Labelled())
    assert_equal(accumulated, whole)
    assert [n for n in notes if "BertForSequenceClassification leaves num_items_in_batch" in n]


def test_dropout_is_no_alarm(tmp_path: Path) -> None:
    trainer, _ = made(tmp_path, transformers.Trainer, Dropping(), size=2)
    scaling = settle_scaling(trainer, trainer.get_train_dataloader(), steps=4)
    assert scaling.is_known and scaling.note is None


def test_tune_trainer_gives_an_own_loss_the_gradient_of_one_batch(tmp_path: Path) -> None:
    class Wide(Net):
        def forward(self, input_ids: Tensor, labels: Any = None, **more: Any) -> Any:
            wide = self.head(self.embed(input_ids).repeat(1, 2_000, 1))
            return {"logits": wide[:, :LENGTH]}

    whole, kept = made(tmp_path, OwnMean, Wide(), size=SAMPLES)
    whole.train()
    parts, accumulated = made(tmp_path, OwnMean, Wide(), size=1)
    card = autobatch.GpuSpec(name="card", capacity_bytes=40 * 2**20, context_bytes=0)
    plan = tune_trainer(parts, target=SAMPLES, gpu=card, cache=False)
    assert plan.accumulation_steps > 1
    assert [note for note in plan.warnings if "loss_is_scaled_for_ga=False was set" in note]
    parts.train()
    assert_equal(accumulated.updates[0], kept.updates[0])


def test_the_split_of_these_tests_is_four_micro_batches() -> None:
    assert split(SAMPLES, ceiling=2).accumulation_steps == 4
