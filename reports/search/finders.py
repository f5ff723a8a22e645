"""Other libraries' batch-size finders on a card, each used as its documentation shows.

All search for one training: a GPT-2 of two layers under bf16 autocast with AdamW, whose user wants
an effective batch of 256. What each tries is noted from inside the training.
"""

from __future__ import annotations

import functools
import importlib
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import autobatch
from reports.search.subjects import TARGET, PlainLoop, Subject, emptied, subject, truth

LENGTH = 512
FINDERS = (
    "autobatch",
    "accelerate",
    "transformers",
    "lightning power",
    "lightning binsearch",
    "toma",
    "batch-finder",
)
PACKAGES = {"lightning power": "lightning", "lightning binsearch": "lightning"}


class Tried:
    """The sizes that a finder has tried, in order; consecutive ones of one size are one trial."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def note(self, size: int) -> None:
        if not self.sizes or self.sizes[-1] != size:
            self.sizes.append(size)


def searched(task: dict[str, Any]) -> dict[str, Any]:
    """Let a finder search, then train with what it found."""
    name = task["finder"]
    package = PACKAGES.get(name, name)
    try:
        release = version("autobatch-gpu" if package == "autobatch" else package)
    except PackageNotFoundError:
        return {"version": None}
    what, tried = subject("gpt2-small", LENGTH), Tried()
    emptied()
    ooms = torch.cuda.memory_stats().get("num_ooms", 0)
    started = time.perf_counter()
    found, effective = _SEARCHES[name](what, tried)
    seconds = time.perf_counter() - started
    record = {
        "version": release,
        "tried": tried.sizes,
        "ooms": torch.cuda.memory_stats()["num_ooms"] - ooms,
        "found": found,
        "effective": effective,
        "seconds": round(seconds, 1),
    }
    if found:
        steps = -(-TARGET // found) if effective == TARGET else 1
        trained = truth(what, found, min(steps, 2))
        record["trains"] = not trained["oom"]
        record["alloc_retries"] = trained["alloc_retries"]
    return record


def with_autobatch(what: Subject, tried: Tried) -> tuple[int | None, int]:
    plan = autobatch.tune(
        what.model, sample=what.sample, loss=what.loss, target=TARGET, autocast="bf16"
    )
    tried.sizes = [trial.micro_batch for trial in plan.trials]
    return plan.ceiling_at_least, plan.effective_batch


def with_accelerate(what: Subject, tried: Tried) -> tuple[int | None, int]:
    """The decorator around a training: its answer is the size of the batch."""
    utilities = importlib.import_module("accelerate.utils")

    def train(batch_size: int) -> int:
        tried.note(batch_size)
        loop = PlainLoop(what)
        for _ in range(2):
            loop.update(batch_size)
        return batch_size

    found: int = utilities.find_executable_batch_size(train, starting_batch_size=TARGET)()
    return found, found


class Words(Dataset):  # type: ignore[type-arg]
    """Sequences of zeros."""

    def __init__(self, count: int = 4 * TARGET) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        words = torch.zeros(LENGTH, dtype=torch.int64)
        return {"input_ids": words, "labels": words}


def with_transformers(what: Subject, tried: Tried) -> tuple[int | None, int]:
    """`auto_find_batch_size=True`, from a batch of the size that is wanted."""
    transformers = importlib.import_module("transformers")

    class Trainer(transformers.Trainer):  # type: ignore[misc, name-defined]
        def training_step(self, model: Any, inputs: Any, *rest: Any, **more: Any) -> Any:
            tried.note(len(inputs["input_ids"]))
            return super().training_step(model, inputs, *rest, **more)

    with tempfile.TemporaryDirectory() as folder:
        options = transformers.TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=TARGET,
            auto_find_batch_size=True,
            max_steps=2,
            bf16=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = Trainer(model=what.model, args=options, train_dataset=Words())
        trainer.train()
        found = int(trainer._train_batch_size)
    what.model.cpu()
    return found, found * options.gradient_accumulation_steps


def with_lightning(what: Subject, tried: Tried, mode: str) -> tuple[int | None, int]:
    """The Tuner's `scale_batch_size`, with its defaults, from 2 upwards."""
    package = importlib.import_module("lightning.pytorch")
    tuner = importlib.import_module("lightning.pytorch.tuner")

    class Module(package.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.batch_size = 2
            self.inner = what.model

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.inner.parameters())

        def train_dataloader(self) -> Any:
            return DataLoader(Words(2**14), batch_size=self.batch_size)

        def training_step(self, batch: Any, index: int) -> Any:
            tried.note(len(batch["input_ids"]))
            return what.loss(self.inner, batch)

    with tempfile.TemporaryDirectory() as folder:
        trainer = package.Trainer(
            accelerator="cuda",
            devices=1,
            max_epochs=1,
            precision="bf16-mixed",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        found: int | None = tuner.Tuner(trainer).scale_batch_size(Module(), mode=mode)
    what.model.cpu()
    return found, found or 0


def with_toma(what: Subject, tried: Tried) -> tuple[int | None, int]:
    """`toma.range` over the samples of an update: it halves its step where memory runs out."""
    package = importlib.import_module("toma")
    loop = PlainLoop(what)
    steps: list[int] = []

    @package.toma.range(initial_step=TARGET)  # type: ignore[untyped-decorator]
    def run(start: int, end: int) -> None:
        tried.note(end - start)
        loop.forward_backward(end - start, (end - start) / TARGET)
        steps.append(end - start)

    for _ in range(2):
        steps.clear()
        run(0, TARGET)
        loop.step()
    return min(steps), sum(steps)  # what it came down to


def with_batch_finder(what: Subject, tried: Tried) -> tuple[int | None, int]:
    """`find_max_minibatch`: forward and backward passes on batches of random values."""
    package = importlib.import_module("batch_finder")

    def model() -> nn.Module:
        made = subject("gpt2-small", LENGTH).model
        plain = made.forward

        @functools.wraps(plain)
        def forward(input_ids: Any, labels: Any = None, **more: Any) -> Any:
            tried.note(len(input_ids))
            with torch.autocast("cuda", dtype=torch.bfloat16):
                return plain(input_ids=input_ids, labels=input_ids, **more)

        made.forward = forward
        return made

    found = package.find_max_minibatch(
        model,
        input_shapes={"input_ids": "(b, t), int", "#constraints": f"t={LENGTH}, b=-1"},
        device=torch.device("cuda"),
        delay=0.0,
        use_subprocess=False,
    )
    if isinstance(found, tuple):
        found = found[0]
    return found, found or 0


_SEARCHES: dict[str, Callable[[Subject, Tried], tuple[int | None, int]]] = {
    "autobatch": with_autobatch,
    "accelerate": with_accelerate,
    "transformers": with_transformers,
    "lightning power": functools.partial(with_lightning, mode="power"),
    "lightning binsearch": functools.partial(with_lightning, mode="binsearch"),
    "toma": with_toma,
    "batch-finder": with_batch_finder,
}
