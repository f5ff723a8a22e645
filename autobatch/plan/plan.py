"""The plan: what to run, and the evidence for it.

Invariant: a plan is immutable, saves as JSON and loads back equal; every other format is
rendered from it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from autobatch.errors import FileError, UsageError
from autobatch.gpus.catalogue import GpuSpec
from autobatch.gpus.uncertainty import likelihood_of
from autobatch.records.codec import RecordError, decode, dump_json, encode, parse_json
from autobatch.records.footprint import Evidence, Footprint
from autobatch.records.split import Split
from autobatch.support.files import read_text, write_text

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from autobatch.accumulate import Windows
    from autobatch.exports.accelerate import AccelerateSettings
    from autobatch.integrations.lightning import LightningSettings

__all__ = [
    "MemoryPoint",
    "ModelFacts",
    "Plan",
    "Timeline",
    "TimelineSegment",
    "Trial",
    "WindowMemory",
]

SCHEMA_VERSION = 1
FILE_LIMIT_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """Two consecutive training windows that really ran, on a GPU or on the virtual one.

    `seconds` is wall time of the whole trial on the machine that ran it, `window_seconds` the
    median time of a window after warm-up on the GPU; None where it was simulated.
    """

    micro_batch: int
    accumulation_steps: int
    fits: bool
    oom: bool
    alloc_retries: int
    peak_allocated_bytes: int
    peak_reserved_bytes: int
    seconds: float
    evidence: Evidence
    window_seconds: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPoint:
    """One point of the memory curve: peaks at one micro-batch, without the context."""

    micro_batch: int
    peak_allocated_bytes: int
    peak_reserved_bytes: int
    evidence: Evidence


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowMemory:
    """Bytes by category at the peak of a training window other than the planned one.

    Attributes:
        micro_batch: samples in each forward/backward.
        accumulation_steps: micro-batches in the window.
        categories: bytes by category, names as in `Footprint.categories`; they sum to the peak.
        peak_allocated_bytes: most bytes of live blocks at once.
    """

    micro_batch: int
    accumulation_steps: int
    categories: Mapping[str, int]
    peak_allocated_bytes: int
    evidence: Evidence


@dataclass(frozen=True, slots=True, kw_only=True)
class TimelineSegment:
    """Bytes alive over part of the traced windows, for the memory-over-time chart.

    Attributes:
        event: index of the trace event at which these figures hold.
        categories: live requested bytes by category, names as in `Footprint.categories`.
        allocated_bytes, reserved_bytes: as the caching allocator counts them.
    """

    event: int
    categories: Mapping[str, int]
    allocated_bytes: int
    reserved_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """The traced windows, thinned for drawing; the peak's sample is always kept."""

    samples: tuple[TimelineSegment, ...]
    marks: tuple[tuple[int, str, int, int], ...]  # (event, phase, window, micro_batch)
    peak_event: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What the report says of the model itself.

    Attributes:
        name: class name of the module.
        parameters: number of elements of all parameters; `trainable_parameters` of those with grad.
        batchnorm_layers: modules whose statistics depend on the micro-batch.
        optimizer: class name of the optimizer that was probed.
        loss: how the loss was obtained: "user", "output.loss", "mean of output.loss",
            "scalar output" or "surrogate sum".
        autocast: "bf16", "fp16" or None.
        clip_norm: the gradient norm clipped to, or None.
    """

    name: str
    parameters: int
    trainable_parameters: int
    batchnorm_layers: int
    optimizer: str
    loss: str
    autocast: str | None
    clip_norm: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to run on each device, and how it is known.

    Attributes:
        target: the effective batch asked for.
        split: how the target is divided into micro-batches over ranks and accumulation steps.
        ceiling: largest micro-batch that fits; None where the search stopped at its upper limit.
        ceiling_at_least: largest micro-batch known to fit (the ceiling where that is known).
        budget_bytes: what the run may reserve: (capacity - context - others) x (1 - headroom).
        others_bytes: what other processes hold on the GPU; 0 where the GPU is virtual.
        allowed_bytes: what `set_per_process_memory_fraction` lets the process reserve; None where
            it sets no limit.
        footprint: bytes by category at the planned micro-batch.
        ceiling_footprint: the same at the ceiling.
        curve: memory against micro-batch, for the chart.
        method: "trace model", "trace model (quadratic)" or "bisection".
        sharding: what the ranks share: "ddp", "fsdp", or "custom" for a function of the user's;
            None where there is one, and in plans from before.
        otherwise: the samples of one update on one GPU all at once, or where that is the plan, in
            two halves; None where the sizes that ran do not tell, and in plans from before.
        warnings: what the user should know, one line each.
    """

    split: Split
    ceiling: int | None
    ceiling_at_least: int
    headroom: float
    budget_bytes: int
    gpu: GpuSpec
    model: ModelFacts
    footprint: Footprint
    ceiling_footprint: Footprint
    trials: tuple[Trial, ...]
    curve: tuple[MemoryPoint, ...]
    timeline: Timeline
    method: str
    warnings: tuple[str, ...]
    versions: Mapping[str, str]
    created: str
    seconds: float
    others_bytes: int = 0
    allowed_bytes: int | None = None
    sharding: Literal["ddp", "fsdp", "custom"] | None = None
    otherwise: WindowMemory | None = None

    @property
    def ceiling_likelihood(self) -> float | None:
        """How likely the ceiling is to fit a real card, by `autobatch.gpus.uncertainty`.

        None where it ran on the card.
        """
        if self.ceiling_footprint.low_device_bytes is None:
            return None
        usable = round(self.budget_bytes / (1 - self.headroom))
        return likelihood_of(self.ceiling_footprint.peak_reserved_bytes, usable)

    @property
    def likelihood(self) -> float | None:
        """How likely the planned micro-batch is to fit a real card; None where it ran on it."""
        if self.footprint.low_device_bytes is None:
            return None
        usable = round(self.budget_bytes / (1 - self.headroom))
        return likelihood_of(self.footprint.peak_reserved_bytes, usable)

    @property
    def target(self) -> int:
        """The effective batch asked for."""
        return self.split.target

    @property
    def micro_batch(self) -> int:
        """Samples in one forward/backward on one GPU; the largest where sizes differ by one."""
        return self.split.micro_batch

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches between two optimizer updates."""
        return self.split.accumulation_steps

    @property
    def world_size(self) -> int:
        """GPUs that share the effective batch."""
        return self.split.world_size

    @property
    def effective_batch(self) -> int:
        """Samples in one optimizer update, over all ranks and accumulation steps."""
        return self.split.effective_batch

    @property
    def executions(self) -> int:
        """Trials that ran."""
        return len(self.trials)

    @property
    def ooms(self) -> int:
        """Trials that ran out of memory."""
        return sum(trial.oom for trial in self.trials)

    @property
    def proven(self) -> bool:
        """Whether the size above the ceiling ran, and did not fit."""
        above = self.ceiling_at_least + 1
        return any(trial.micro_batch == above and not trial.fits for trial in self.trials)

    @property
    def slack_bytes(self) -> int:
        """What the planned micro-batch leaves of the budget."""
        return self.budget_bytes - self.footprint.peak_reserved_bytes

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the plan as JSON, whole or not at all, and return the path.

        Raises:
            FileError: the file cannot be written.
        """
        return write_text(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan that `save` wrote; the result equals the plan that was saved.

        Raises:
            FileError: the file cannot be read, or does not hold a sound plan of this schema.
        """
        text = read_text(path, limit_bytes=FILE_LIMIT_BYTES)
        try:
            return _from_document(parse_json(text))
        except RecordError as error:
            raise FileError(f"{os.fspath(path)!r} is not a plan: {error}") from error

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read what `to_json` rendered.

        Raises:
            FileError: the text is no sound plan of this schema.
        """
        try:
            return _from_document(parse_json(text))
        except RecordError as error:
            raise FileError(f"the JSON text is not a plan: {error}") from error

    def to_json(self) -> str:
        """Render the plan as the JSON text that `save` writes."""
        header = {"schema_version": SCHEMA_VERSION, "answer": _answer(self)}
        return dump_json(header | encode(self))

    def report(self, folder: str | os.PathLike[str]) -> Path:
        """Write the report into `folder` and return the path of its report.html.

        The folder gets report.html, report.md, plan.json, trials.csv, breakdown.csv, curve.csv,
        timeline.csv and the charts as PNG and SVG.

        Raises:
            FileError: the folder cannot be written.
        """
        from autobatch.report import write_report

        return write_report(self, folder)

    def to_training_arguments(self, *, nearest: bool = False) -> dict[str, Any]:
        """Return keyword arguments for `transformers.TrainingArguments`.

        Micro-batch (per device), accumulation steps, clipping (0.0 turns it off: Trainer clips to
        1.0 by default), bf16 or fp16, and token means over all devices. A plan for AdamW names
        `adamw_torch_fused`, which never needs more memory than planned. Left alone:
        `dataloader_drop_last`, which would drop evaluation samples too, and how ranks share the
        model. docs/trainers/transformers.md says what happens to the last window of an epoch.

        Args:
            nearest: where the plan is ragged, take the nearest effective batch of one size.

        Raises:
            UsageError: the plan is ragged and `nearest` is not set, transformers is not installed,
                or its version lacks an argument.
        """
        with _extra("hf"):
            from autobatch.integrations import transformers as huggingface
        return huggingface.training_arguments(self, nearest=nearest)

    def to_accelerate(self, *, nearest: bool = False) -> AccelerateSettings:
        """Return (keyword arguments for `accelerate.Accelerator`, those for the DataLoader).

        Windows go on over the end of an epoch (`sync_with_dataloader=False`), so each has all its
        micro-batches, and none is short (`drop_last`).

        Args:
            nearest: where the plan is ragged, take the nearest effective batch of one size.

        Raises:
            UsageError: as `to_training_arguments`, of accelerate.
        """
        with _extra("accelerate"):
            from autobatch.exports import accelerate
        return accelerate.settings(self, nearest=nearest)

    def to_lightning(
        self, *, samples: int | None = None, nearest: bool = False
    ) -> LightningSettings:
        """Return (keyword arguments for Lightning's `Trainer`, those for the DataLoader).

        Args:
            samples: length of the training set; with it, an epoch ends after its last whole window
                (`limit_train_batches`). Lightning divides the loss of a partial one by the steps of
                a whole one.
            nearest: where the plan is ragged, take the nearest effective batch of one size.

        Raises:
            UsageError: as `to_training_arguments`, of lightning; `samples` make no whole window.
        """
        with _extra("lightning"):
            from autobatch.integrations import lightning
        return lightning.settings(self, samples=samples, nearest=nearest)

    def to_deepspeed(
        self, *, zero_stage: int | None = None, nearest: bool = False
    ) -> dict[str, Any]:
        """Return the part of a DeepSpeed configuration that the plan decides.

        `train_batch_size`, `train_micro_batch_size_per_gpu`, `gradient_accumulation_steps`,
        `gradient_clipping`, `bf16` and `fp16`, and the ZeRO stage: 3 for "fsdp", else 0. It is
        plain data for JSON; DeepSpeed need not be installed. Its bf16 keeps half-precision weights
        beside fp32 ones, where the plan was made with autocast.

        Args:
            zero_stage: the stage to name instead.
            nearest: where the plan is ragged, take the nearest effective batch of one size.

        Raises:
            UsageError: the plan is ragged and `nearest` is not set; the stage is unknown, as with a
                sharding function.
        """
        from autobatch.exports import deepspeed

        return deepspeed.configuration(self, zero_stage=zero_stage, nearest=nearest)

    def to_env(self, *, nearest: bool = False) -> dict[str, str]:
        """Return the answer as environment variables, names and values.

        AUTOBATCH_MICRO_BATCH, AUTOBATCH_ACCUMULATION_STEPS, AUTOBATCH_WORLD_SIZE,
        AUTOBATCH_EFFECTIVE_BATCH, and where they are set AUTOBATCH_AUTOCAST and
        AUTOBATCH_CLIP_NORM.

        Args:
            nearest: where the plan is ragged, take the nearest effective batch of one size.

        Raises:
            UsageError: the plan is ragged and `nearest` is not set.
        """
        from autobatch.exports import plain

        return plain.environment(self, nearest=nearest)

    def to_yaml(self) -> str:
        """Return the answer as a few lines of YAML, with every window's sizes if it is ragged."""
        from autobatch.exports import plain

        return plain.yaml(self)

    def windows(
        self,
        loader: Iterable[Any],
        optimizer: Optimizer | Sequence[Optimizer],
        **options: Any,
    ) -> Windows:
        """Return the plan's training windows over a loader, for a loop of your own.

        As `autobatch.windows`, with this rank's micro-batches of the plan. `clip_norm` is the
        plan's unless another is given, and FSDP2 reduces gradients in each micro-batch, as the plan
        counted memory, unless `sync="last"` is given.

        Raises:
            UsageError: the plan is for another number of ranks, or as from `autobatch.windows`.
        """
        from autobatch.accumulate import planned_windows

        return planned_windows(self, loader, optimizer, **options)

    def scale_lr(
        self, lr: float, from_batch: int, rule: Literal["auto", "linear", "sqrt"] = "auto"
    ) -> float:
        """Return the learning rate for the plan's effective batch, from one tuned for another.

        Args:
            lr: the learning rate that was tuned.
            from_batch: the effective batch that it was tuned for, in samples per update.
            rule: "linear" for SGD (Goyal et al. 2017, https://arxiv.org/abs/1706.02677), "sqrt"
                for Adam and RMSprop (Malladi et al. 2022, https://arxiv.org/abs/2205.10287);
                "auto" takes the one for the plan's optimizer.

        Raises:
            UsageError: a number is not positive, or no rule is established for the optimizer.
        """
        from autobatch.advice import scaled_rate

        return scaled_rate(
            lr,
            from_batch=from_batch,
            to_batch=self.effective_batch,
            optimizer=self.model.optimizer,
            rule=rule,
        )

    def __str__(self) -> str:
        """Render the plan as plain text, the answer first."""
        from autobatch.report.document import summary
        from autobatch.report.text import render

        return render(summary(self))

    def _repr_html_(self) -> str:
        """Render the summary as an HTML fragment for notebooks."""
        from autobatch.report.html import notebook

        return notebook(self)


@contextlib.contextmanager
def _extra(name: str) -> Iterator[None]:
    """Say how to get a library that an import does not find."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise UsageError(
            f"{error.name} is not installed: pip install 'autobatch-gpu[{name}]', where the "
            "training will run, and load the saved plan there"
        ) from error


def _answer(plan: Plan) -> dict[str, int | None]:
    """What readers of the JSON want first; derived, and checked when a plan is loaded."""
    return {
        "micro_batch": plan.micro_batch,
        "accumulation_steps": plan.accumulation_steps,
        "world_size": plan.world_size,
        "effective_batch": plan.effective_batch,
        "ceiling": plan.ceiling,
    }


def _from_document(document: object) -> Plan:
    if not isinstance(document, dict):
        raise RecordError("it does not hold a JSON object")
    version = document.pop("schema_version", None)
    if version != SCHEMA_VERSION:
        raise RecordError(
            f"its schema_version is {str(version)[:20]!r}, and this autobatch reads "
            f"{SCHEMA_VERSION}; make the plan again, or use the autobatch that wrote it"
        )
    answer = document.pop("answer", None)
    plan = decode(Plan, document)
    _check_sound(plan)
    if answer != _answer(plan):
        raise RecordError("its answer does not agree with its split")
    return plan


def _check_sound(plan: Plan) -> None:
    """Refuse what no tuner writes and no report can render."""
    windows = plan.split.windows
    footprints = (plan.footprint, plan.ceiling_footprint)
    rules = {
        "split.windows must hold sizes of at least 1, as many for each rank": (
            bool(windows)
            and len({len(window) for window in windows}) == 1
            and all(window and min(window) >= 1 for window in windows)
        ),
        "split.windows must sum to split.target": sum(map(sum, windows)) == plan.target,
        "gpu.capacity_bytes and budget_bytes must be positive": (
            plan.gpu.capacity_bytes > 0 and plan.budget_bytes > 0
        ),
        "headroom must be at least 0 and below 1": 0 <= plan.headroom < 1,
        "model.autocast must be bf16, fp16 or null": plan.model.autocast in (None, "bf16", "fp16"),
        "every ceiling must be at least 1": plan.ceiling_at_least >= 1
        and (plan.ceiling is None or plan.ceiling >= 1),
        "every micro_batch must be at least 1": (
            all(footprint.micro_batch >= 1 for footprint in footprints)
            and all(trial.micro_batch >= 1 for trial in plan.trials)
            and all(point.micro_batch >= 1 for point in plan.curve)
        ),
        "every footprint's categories must sum to its peak_allocated_bytes, above 0": all(
            sum(footprint.categories.values()) == footprint.peak_allocated_bytes > 0
            for footprint in footprints
        ),
    }
    if plan.otherwise is not None:
        parts = plan.otherwise.categories
        rules["otherwise's categories must sum to its peak_allocated_bytes, above 0"] = (
            set(parts) == set(plan.footprint.categories)
            and sum(parts.values()) == plan.otherwise.peak_allocated_bytes > 0
        )
    for rule, holds in rules.items():
        if not holds:
            raise RecordError(rule)
