"""The plan: what to run, and the evidence for it.

Invariant: a plan is immutable, saves as JSON and loads back equal; every other format is
rendered from it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from autobatch.errors import FileError, UsageError
from autobatch.records.codec import RecordError
from autobatch.records.plan_json import read_plan, write_plan
from autobatch.records.plan_record import PlanRecord
from autobatch.support.files import read_text, write_text
from autobatch.support.installing import install_line
from autobatch.support.wording import near

if TYPE_CHECKING:
    import pandas as pd
    from torch.optim import Optimizer
    from typing_extensions import Unpack

    from autobatch.accumulate.windows import WindowOptions, Windows
    from autobatch.exports.accelerate import AccelerateSettings
    from autobatch.exports.lightning import LightningSettings

__all__ = ["Plan"]

FILE_LIMIT_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan(PlanRecord):
    """What to run on each device, and how it is known; what can be done with it.

    The fields are those of `PlanRecord`.
    """

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
            return read_plan(cls, text)
        except RecordError as error:
            raise FileError(f"{os.fspath(path)!r} is not a plan: {error}") from error

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read what `to_json` rendered.

        Raises:
            FileError: the text is no sound plan of this schema.
        """
        try:
            return read_plan(cls, text)
        except RecordError as error:
            raise FileError(f"the JSON text is not a plan: {error}") from error

    def to_json(self) -> str:
        """Render the plan as the JSON text that `save` writes."""
        return write_plan(self)

    def report(self, folder: str | os.PathLike[str]) -> Path:
        """Write the report into `folder` and return the path of its report.html.

        The folder gets report.html, report.md, plan.json, trials.csv, breakdown.csv, blocks.csv,
        curve.csv, timeline.csv and the charts as SVG.

        Raises:
            FileError: the folder cannot be written.
        """
        from autobatch.report.folder import write_report

        return write_report(self, folder)

    def to_frame(
        self, of: Literal["trials", "curve", "breakdown", "blocks", "timeline"] = "trials"
    ) -> pd.DataFrame:
        """Return numbers of the plan as a data frame; sizes are bytes, times seconds, as named.

        Args:
            of: "trials": what ran, a row each. "curve": memory against micro-batch, and what fits.
                "breakdown": bytes by category, at the plan and at the ceiling. "blocks": what is
                alive at the peak, most bytes first: its module, operator, shape, dtype and line of
                code. "timeline": live bytes by category over the traced windows.

        Raises:
            UsageError: there are no such numbers.
        """
        from autobatch.report.rows import ROWS
        from autobatch.report.table import frame

        if of not in ROWS:
            raise UsageError(f"of is {of!r}{near(str(of), ROWS)}: use one of {', '.join(ROWS)}")
        return frame(self, of)

    def to_training_arguments(
        self, *, nearest: bool = False, by_hand: bool = False
    ) -> dict[str, Any]:
        """Return keyword arguments for `transformers.TrainingArguments`.

        Micro-batch (per device), accumulation steps, clipping (0.0 turns it off: Trainer clips to
        1.0 by default), bf16 or fp16, and token means over all devices. A plan for AdamW names
        `adamw_torch_fused`, which never needs more memory than planned. Levers of the plan that
        Trainer has arguments for (checkpointing every block, TF32, optimizers) are set. Left alone:
        `dataloader_drop_last`, which would drop evaluation samples too, and how ranks share the
        model. docs/trainers/transformers.md says what happens to the last window of an epoch.

        Args:
            nearest: where the plan is ragged, take the nearest effective batch of one size.
            by_hand: your code applies levers of the plan that no argument sets, such as LoRA;
                its lines are in the report.

        Raises:
            UsageError: the plan is ragged and `nearest` is not set, it has levers that no argument
                sets and `by_hand` is not set, transformers is not installed, or its version lacks
                an argument.
        """
        with _extra("hf"):
            from autobatch.exports import transformers
        return transformers.training_arguments(self, nearest=nearest, by_hand=by_hand)

    def to_accelerate(self, *, nearest: bool = False, by_hand: bool = False) -> AccelerateSettings:
        """Return (keyword arguments for `accelerate.Accelerator`, those for the DataLoader).

        Windows go on over the end of an epoch (`sync_with_dataloader=False`), so each has all its
        micro-batches, and none is short (`drop_last`).

        Args:
            nearest: where the plan is ragged, take the nearest effective batch of one size.
            by_hand: your code applies levers of the plan that no argument sets, such as LoRA;
                its lines are in the report.

        Raises:
            UsageError: as `to_training_arguments`, of accelerate.
        """
        with _extra("accelerate"):
            from autobatch.exports import accelerate
        return accelerate.settings(self, nearest=nearest, by_hand=by_hand)

    def to_lightning(
        self, *, samples: int | None = None, nearest: bool = False, by_hand: bool = False
    ) -> LightningSettings:
        """Return (keyword arguments for Lightning's `Trainer`, those for the DataLoader).

        Args:
            samples: length of the training set; with it, an epoch ends after its last whole window
                (`limit_train_batches`). Lightning divides the loss of a partial one by the steps of
                a whole one, which `autobatch.integrations.lightning.MeanOverWindow` mends.
            nearest: where the plan is ragged, take the nearest effective batch of one size.
            by_hand: your code applies levers of the plan that no argument sets, such as LoRA;
                its lines are in the report.

        Raises:
            UsageError: as `to_training_arguments`, of lightning; `samples` make no whole window.
        """
        with _extra("lightning"):
            from autobatch.exports import lightning
        return lightning.settings(self, samples=samples, nearest=nearest, by_hand=by_hand)

    def to_deepspeed(
        self, *, zero_stage: int | None = None, nearest: bool = False, by_hand: bool = False
    ) -> dict[str, Any]:
        """Return the part of a DeepSpeed configuration that the plan decides.

        `train_batch_size`, `train_micro_batch_size_per_gpu`, `gradient_accumulation_steps`,
        `gradient_clipping`, `bf16` and `fp16`, and the ZeRO stage: 3 for "fsdp", else 0. It is
        plain data for JSON; DeepSpeed need not be installed. Its bf16 keeps half-precision weights
        beside fp32 ones, where the plan was made with autocast; weights that the plan has in
        bfloat16 alone are not that, and need `by_hand`.

        Args:
            zero_stage: the stage to name instead.
            nearest: where the plan is ragged, take the nearest effective batch of one size.
            by_hand: your code applies levers of the plan that no setting does, such as LoRA;
                its lines are in the report.

        Raises:
            UsageError: the plan is ragged and `nearest` is not set, it has levers and `by_hand` is
                not set; the stage is unknown, as with a sharding function.
        """
        from autobatch.exports import deepspeed

        return deepspeed.configuration(
            self, zero_stage=zero_stage, nearest=nearest, by_hand=by_hand
        )

    def to_env(self, *, nearest: bool = False) -> dict[str, str]:
        """Return the answer as environment variables, names and values.

        AUTOBATCH_MICRO_BATCH, AUTOBATCH_ACCUMULATION_STEPS, AUTOBATCH_WORLD_SIZE,
        AUTOBATCH_EFFECTIVE_BATCH, and where they are set AUTOBATCH_AUTOCAST, AUTOBATCH_CLIP_NORM
        and AUTOBATCH_LEVERS, which names what the script has to do itself.

        Args:
            nearest: where the plan is ragged, take the nearest effective batch of one size.

        Raises:
            UsageError: the plan is ragged and `nearest` is not set.
        """
        from autobatch.exports import plain

        return plain.environment(self, nearest=nearest)

    def to_yaml(self) -> str:
        """Return the answer as a few lines of YAML, with levers and a ragged plan's windows."""
        from autobatch.exports import plain

        return plain.yaml(self)

    def windows(
        self,
        loader: Iterable[Any],
        optimizer: Optimizer | Sequence[Optimizer],
        **options: Unpack[WindowOptions],
    ) -> Windows:
        """Return the plan's training windows over a loader, for a loop of your own.

        As `autobatch.windows`, with this rank's micro-batches of the plan. `clip_norm` is the
        plan's unless another is given, and FSDP2 reduces gradients in each micro-batch, as the plan
        counted memory, unless `sync="last"` is given.

        Raises:
            UsageError: the plan is for another number of ranks, or as from `autobatch.windows`.
        """
        from autobatch.accumulate.windows import planned_windows

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
        from autobatch.advice.rates import scaled_rate

        return scaled_rate(
            lr,
            from_batch=from_batch,
            to_batch=self.effective_batch,
            optimizer=self.model.optimizer,
            rule=rule,
        )

    def __repr__(self) -> str:
        """Name the answer; `print(plan)` shows the whole, `plan.to_json()` every field."""
        size = f"{self.micro_batch:,}" if self.micro_batch else "of several sizes"
        return (
            f"<Plan of {self.model.name} on {self.gpu.name}: {self.effective_batch:,} samples an "
            f"update, micro-batch {size}, at least {self.ceiling_at_least:,} fit, "
            f"{self.footprint.evidence}>"
        )

    def __str__(self) -> str:
        """Render the plan as plain text, the answer first."""
        from autobatch.report.content import summary
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
            f"{error.name} is not installed: {install_line(name)}, where the training will run, "
            "and load the saved plan there"
        ) from error
