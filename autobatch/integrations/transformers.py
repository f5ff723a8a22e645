"""Tuning transformers' Trainer before it trains.

A callback cannot do the tuning by itself: `Trainer.__init__` has read the micro-batch when it calls
`on_init_end`, no hook hands the trainer over, and the next one, `on_train_begin`, comes after the
dataloader and the learning-rate schedule were made. So `tune_trainer` sets the sizes between
`Trainer(...)` and `trainer.train()`, as a hyperparameter search does, and the callback that it
leaves behind keeps the plan with every checkpoint and refuses to train with other sizes.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import get_last_checkpoint

from autobatch.errors import AutobatchWarning, DoesNotFitError, UsageError, WorkloadError
from autobatch.exports.one_size import one_size
from autobatch.exports.transformers import RECOMPUTE, TRAINER
from autobatch.integrations.accelerate import return_fp32
from autobatch.integrations.nearest import tuned_to_one_size
from autobatch.integrations.transformers_evaluation import Evaluation, evaluation_of
from autobatch.integrations.transformers_scale import Scaling, settle_scaling
from autobatch.plan.plan import Plan
from autobatch.records.evidence import Timeline
from autobatch.records.progress import ProgressCallback, silent
from autobatch.support.randomness import random_state_kept
from autobatch.support.units import format_bytes
from autobatch.support.wording import count, one_line
from autobatch.tuning.tuner import Gpu, tune
from autobatch.workload.workload import Workload

__all__ = ["AutobatchCallback", "tune_trainer"]

_STATE_FILE = "trainer_state.json"

_WORTH_SAYING = 0.01
"""Share of the budget from which on inputs that wait are mentioned."""


def tune_trainer(
    trainer: Trainer,
    *,
    target: int,
    nearest: bool = False,
    resume_from_checkpoint: str | bool | None = None,
    sample: Any = None,
    gpu: Gpu = None,
    headroom: float | None = None,
    cache: str | os.PathLike[str] | Literal[False] | None = None,
    progress: ProgressCallback = silent,
) -> Plan:
    """Find the sizes for a trainer that is about to train, set them, and return the plan.

    What is probed is what `trainer.train()` runs: its model, its training set through its collator,
    its `compute_loss`, its optimizer, precision, clipping and gradient checkpointing, and the
    evaluation that it runs while it trains, with the logits that it keeps. Call it after
    `Trainer(...)` and before `trainer.train()`, whose dataloader and learning-rate schedule follow
    from the sizes. In a distributed run all ranks call it, and take the plan of the GPU that holds
    least. Where anything is raised, the trainer is as before.

    Args:
        trainer: set up, not yet trained; its batch size and accumulation steps are replaced.
        target: effective batch: samples per optimizer update over all GPUs.
        nearest: where the target needs micro-batches of several sizes, take the nearest effective
            batch that does not, and say so in the plan's warnings.
        resume_from_checkpoint: what `trainer.train` will get. The plan is then that of the
            checkpoint, and nothing is probed.
        sample: one batch, a Dataset or a DataLoader, in place of the trainer's own.
        gpu: as in `autobatch.tune`: None measures the current CUDA device.
        headroom: as in `autobatch.tune`.
        cache: as in `autobatch.tune`.
        progress: told of each step.

    Raises:
        UsageError: the trainer does what is not simulated (FSDP, DeepSpeed, DataParallel,
            `auto_find_batch_size`), the target needs several sizes, the checkpoint holds no plan
            for this target, or the loss's gradient depends on the accumulation steps whatever the
            trainer is told.
        AutobatchError: as from `autobatch.tune`.
    """
    _refuse_the_unknown(trainer)
    checkpoint = _checkpoint_of(trainer, resume_from_checkpoint)
    if checkpoint is not None:
        plan = _kept_plan(checkpoint, target, trainer.args.world_size)
    else:
        with _as_trained(trainer), random_state_kept():
            make = partial(
                tune,
                sample=trainer.get_train_dataloader() if sample is None else sample,
                loss=_Loss(trainer),
                optimizer=trainer.create_optimizer(),
                gpu=gpu,
                headroom=headroom,
                autocast=_autocast(trainer.args),
                clip_norm=trainer.args.max_grad_norm or None,
                cache=cache,
                progress=progress,
            )

            def planned(evaluation: Evaluation | None) -> Plan:
                given: Any = trainer.model
                if evaluation is not None:
                    given = Workload(model=given, batch=_of_the_sample, evaluate=evaluation)
                sized = partial(_roomy, partial(make, given))
                return tuned_to_one_size(sized, target, TRAINER, nearest=nearest)

            plan = _with_evaluation(planned, evaluation_of(trainer))
    with random_state_kept():
        given = trainer.get_train_dataloader() if sample is None else sample
        scaling = settle_scaling(trainer, given, steps=plan.accumulation_steps)
    _set_sizes(trainer, plan)
    callback = AutobatchCallback(_noted(plan, scaling), target=target)
    callback.scaling = scaling
    trainer.add_callback(callback)
    return callback.plan


class AutobatchCallback(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Keeps a plan with every checkpoint, and refuses to train with other sizes than the plan's.

    `tune_trainer` adds it. By itself it goes with
    `TrainingArguments(**plan.to_training_arguments())`, and lets the trainer scale its loss such
    that windows of several micro-batches have the gradient of one batch.

    Args:
        plan: of one size; or the dict that a checkpoint holds of it.
        target: the effective batch that was asked for, if the plan's is the nearest to it.

    Raises:
        UsageError: the plan is ragged.
    """

    def __init__(self, plan: Plan | Mapping[str, Any], target: int | None = None) -> None:
        self.plan = plan if isinstance(plan, Plan) else Plan.from_json(json.dumps(plan))
        self.target = target or self.plan.target
        self.scaling: Scaling | None = None  # None until it is settled
        one_size(self.plan, TRAINER)

    def state(self) -> dict[str, Any]:
        """Return what goes into a checkpoint's trainer_state.json: the plan, less its timeline."""
        kept = replace(self.plan, timeline=Timeline(samples=(), marks=(), peak_event=0))
        args = {"plan": json.loads(kept.to_json()), "target": self.target}
        return {"args": args, "attributes": {}}

    def on_train_begin(
        self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **_: Any
    ) -> None:
        """Compare the sizes that training begins with to the plan's, and settle the loss's scale.

        Raises:
            UsageError: the sizes, or those of a checkpoint, differ; or the gradient depends on the
                accumulation steps whatever the trainer is told.
        """
        planned = (self.plan.micro_batch, self.plan.accumulation_steps, self.plan.world_size)
        loaded = state.train_batch_size // max(1, args.n_gpu)
        real = (loaded, args.gradient_accumulation_steps, args.world_size)
        if real != planned:
            raise UsageError(
                f"training begins with {_written(real)}, the plan says {_written(planned)}: make "
                "TrainingArguments from plan.to_training_arguments(), or call "
                "tune_trainer(trainer, ...) with the same resume_from_checkpoint as train()"
            )
        trainer = _trainer_at_work()
        steps = self.plan.accumulation_steps
        if self.scaling is None and steps > 1 and trainer is not None:
            self.scaling = settle_scaling(trainer, train_dataloader, steps=steps)
            if (note := self.scaling.note) is not None and note not in self.plan.warnings:
                warnings.warn(note, AutobatchWarning, stacklevel=2)
            self.plan = _noted(self.plan, self.scaling)


def _trainer_at_work() -> Trainer | None:
    """Find the trainer that calls its callbacks: none is handed it, but its `train` is running."""
    frame = inspect.currentframe()
    while frame is not None:
        found = frame.f_locals.get("self")
        if isinstance(found, Trainer):
            return found
        frame = frame.f_back
    return None


def _noted(plan: Plan, scaling: Scaling) -> Plan:
    if scaling.note is None or scaling.note in plan.warnings:
        return plan
    return replace(plan, warnings=(*plan.warnings, scaling.note))


def _written(sizes: tuple[int, int, int]) -> str:
    micro_batch, steps, ranks = sizes
    return (
        f"micro-batch {micro_batch} × {count(steps, 'step')} × {count(ranks, 'rank')} = "
        f"{micro_batch * steps * ranks}"
    )


def _refuse_the_unknown(trainer: Trainer) -> None:
    args = trainer.args
    reasons = {
        "FSDP": trainer.is_fsdp_enabled or trainer.is_fsdp_xla_enabled,
        "DeepSpeed": trainer.is_deepspeed_enabled,
        "DataParallel over several GPUs of one process": args.n_gpu > 1,
        "auto_find_batch_size": args.auto_find_batch_size,
        "train_sampling_strategy='batch_rebalance'": (
            getattr(args, "train_sampling_strategy", None) == "batch_rebalance"
        ),
        "accumulation inside of accelerate": trainer.accelerator.gradient_accumulation_steps != 1,
    }
    found = [reason for reason, holds in reasons.items() if holds]
    if found:
        raise UsageError(
            f"tune_trainer cannot plan for {' and '.join(found)}: call autobatch.tune (with "
            "sharding= where parameters are sharded), and set what plan.to_training_arguments() "
            "says"
        )


def _of_the_sample(samples: int) -> Any:
    """Stand for the batches of a workload, which `tune` takes from the sample."""
    raise NotImplementedError


def _with_evaluation(
    planned: Callable[[Evaluation | None], Plan], evaluation: Evaluation | str | None
) -> Plan:
    """Return the plan of training with its evaluation; where that fails, without it, and say so.

    Raises:
        DoesNotFitError: training fits, but its evaluation does not, or nothing does.
    """
    if evaluation is None:
        return planned(None)
    reason = evaluation
    if isinstance(evaluation, Evaluation):
        try:
            return planned(evaluation)
        except WorkloadError as error:
            reason = one_line(error)
        except DoesNotFitError as error:
            plan = planned(None)  # raises where training does not fit, either
            raise DoesNotFitError(
                f"training fits at micro-batch {plan.micro_batch:,}, but its evaluation does not: "
                f"it keeps the outputs of {count(evaluation.kept, 'batch', 'batches')} on the GPU "
                "until it ends; set eval_accumulation_steps, a smaller "
                "per_device_eval_batch_size or preprocess_logits_for_metrics, or prediction_loss_"
                f"only=True ({str(error).partition('; try ')[0]})"
            ) from error
    plan = planned(None)
    note = (
        f"the evaluation of the trainer was not probed ({reason}): it may need more memory than "
        "training; eval_accumulation_steps bounds what it keeps"
    )
    return replace(plan, warnings=(*plan.warnings, note))


def _roomy(make: Callable[..., Plan], target: int) -> Plan:
    """Return a plan that leaves room for the other micro-batches of a window.

    Trainer moves all of them to the GPU before the first one runs (`get_batch_samples`).
    """
    plan = make(target=target)
    samples = -(-target // plan.world_size)
    window_bytes = plan.footprint.inputs_bytes * samples // plan.micro_batch
    if plan.slack_bytes < window_bytes - plan.footprint.inputs_bytes:
        usable_bytes = plan.budget_bytes / (1 - plan.headroom)
        headroom = plan.headroom + window_bytes / usable_bytes
        plan = make(target=target, headroom=min(headroom, 0.99))
    if window_bytes < _WORTH_SAYING * plan.budget_bytes:
        return plan
    note = (
        f"Trainer keeps the inputs of a whole window on the GPU, {format_bytes(window_bytes)}, of "
        "which the footprint counts one micro-batch; there is room for them"
    )
    return replace(plan, notes=(*plan.notes, note))


def _set_sizes(trainer: Trainer, plan: Plan) -> None:
    trainer.args.per_device_train_batch_size = plan.micro_batch
    trainer.args.gradient_accumulation_steps = plan.accumulation_steps
    # read from the arguments only once, in __init__, and by a hyperparameter search again
    trainer._train_batch_size = trainer.args.train_batch_size


def _autocast(args: TrainingArguments) -> str | None:
    if args.bf16:
        return "bf16"
    return "fp16" if args.fp16 else None


class _Loss:
    """The trainer's loss of one micro-batch, on a model that accelerate has not prepared."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        if _autocast(self._trainer.args) is not None:
            return_fp32(model)
        inputs = dict(batch)
        labels = inputs.get("labels")
        # any number: with one, models sum over tokens and divide, as they do in training
        items = labels.numel() if isinstance(labels, Tensor) else None
        loss: Tensor = self._trainer.compute_loss(model, inputs, num_items_in_batch=items)
        return loss

    @property
    def cache_key(self) -> str:
        """What the loss is, beside the code of its class."""
        trainer = self._trainer
        smoothing, own = trainer.args.label_smoothing_factor, trainer.compute_loss_func
        return f"{type(trainer)} {smoothing} {own and own.__qualname__} {_autocast(trainer.args)}"


@contextlib.contextmanager
def _as_trained(trainer: Trainer) -> Iterator[None]:
    """Let the model recompute activations as `train()` will; drop the optimizer afterwards."""
    given = trainer.optimizer
    recompute = RECOMPUTE if getattr(trainer.args, RECOMPUTE) else None
    switched = recompute is not None and not getattr(trainer.model, f"is_{recompute}")
    if switched:
        options = dict(getattr(trainer.args, f"{recompute}_kwargs") or {})
        own = {key: options.pop(key) for key in ("every_n_layers", "offload") if key in options}
        enable = getattr(trainer.model, f"{recompute}_enable")
        enable(**{f"{recompute}_kwargs": options or None}, **own)
    try:
        yield
    finally:
        trainer.optimizer = given
        if switched:
            getattr(trainer.model, f"{recompute}_disable")()


def _checkpoint_of(trainer: Trainer, resume: str | bool | None) -> Path | None:
    if not resume:
        return None
    found = get_last_checkpoint(trainer.args.output_dir) if resume is True else resume
    if found is None:
        raise UsageError(f"there is no checkpoint in {trainer.args.output_dir!r} to resume from")
    return Path(found)


def _kept_plan(checkpoint: Path, target: int, world_size: int) -> Plan:
    """Return the plan that a checkpoint was made with."""
    state_file = checkpoint / _STATE_FILE
    try:
        state = json.loads(state_file.read_text(encoding="utf-8"))
        kept = AutobatchCallback.from_state(state["stateful_callbacks"]["AutobatchCallback"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{str(state_file)!r} holds no plan: the run that wrote it was not tuned; resume it "
            "without tune_trainer, with the sizes that it had"
        ) from error
    plan: Plan = kept.plan
    if (kept.target, plan.world_size) != (target, world_size):
        raise UsageError(
            f"{str(checkpoint)!r} was trained with an effective batch of {kept.target} on "
            f"{plan.world_size} ranks, and this run asks for {target} on {world_size}: resume with "
            "what it had, or start a new run from its weights"
        )
    return plan
