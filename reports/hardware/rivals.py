"""What other libraries' batch-size finders need for the same windows under the same limit.

Each one gets the training window of the probe and is used as its documentation shows. What it tries
is noted from inside the window.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import importlib
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from autobatch.support.oom import shortage_in
from autobatch.workload.workload import Workload
from reports.common.results import one_line
from reports.hardware.bench import Bench
from reports.hardware.findings import Findings
from reports.hardware.measure import PlainTraining, run_plain

PACKAGES = ("accelerate", "lightning")
CAP_S = 25.0
WINDOWS = 2


class TimeIsUpError(Exception):
    """A finder has had its share of the time."""


class Tried:
    """The sizes that a finder has tried, in order."""

    def __init__(self, card: Any, cap_s: float):
        self._card = card
        self._deadline = time.perf_counter() + cap_s
        self.rows: list[dict[str, Any]] = []

    @contextlib.contextmanager
    def window(self, micro_batch: int) -> Iterator[None]:
        """Note a window; consecutive ones of one size are one trial.

        Raises:
            TimeIsUpError: it may not begin.
        """
        started = time.perf_counter()
        if started > self._deadline:
            raise TimeIsUpError
        if not self.rows or self.rows[-1]["micro_batch"] != micro_batch or self.rows[-1]["oom"]:
            self.rows.append(
                {"micro_batch": micro_batch, "oom": False, "alloc_retries": 0, "seconds": 0.0}
            )
        row = self.rows[-1]
        retries = self._card.stats().alloc_retries
        try:
            yield
        except Exception as error:
            row["oom"] = shortage_in(error) is not None
            raise
        finally:
            row["seconds"] += time.perf_counter() - started
            row["alloc_retries"] += self._card.stats().alloc_retries - retries


def with_accelerate(workload: Workload, bench: Bench, tried: Tried, start: int) -> int:
    """Search with accelerate, from `start` downwards."""
    utilities = importlib.import_module("accelerate.utils")

    def train(batch_size: int) -> int:
        with tried.window(batch_size):
            PlainTraining(workload, bench.card.device).windows(batch_size, WINDOWS)
        return batch_size

    found: int = utilities.find_executable_batch_size(train, starting_batch_size=start)()
    return found


class Endless(IterableDataset):  # type: ignore[type-arg]
    """Gives nothing of interest for ever: each window makes its own micro-batches."""

    def __iter__(self) -> Iterator[int]:
        while True:
            yield 0


def lightning_package() -> Any:
    """Return `lightning.pytorch`, else `pytorch_lightning`.

    Raises:
        ImportError: neither is there.
    """
    try:
        return importlib.import_module("lightning.pytorch")
    except ImportError:
        return importlib.import_module("pytorch_lightning")


def with_lightning(workload: Workload, bench: Bench, tried: Tried, mode: str) -> int | None:
    """Search with Lightning's Tuner, from 2 upwards; its other settings are its defaults."""
    package = lightning_package()
    tuner = importlib.import_module(f"{package.__name__}.tuner")

    class Module(package.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.batch_size = 2
            self.inner = copy.deepcopy(workload.model)

        def configure_optimizers(self) -> Any:
            make: Any = workload.optimizer
            return make(list(self.inner.parameters()))

        def train_dataloader(self) -> Any:
            return DataLoader(Endless(), batch_size=None)

        def training_step(self, batch: Any, index: int) -> None:
            with tried.window(self.batch_size):
                run_plain(workload, self.inner, self.optimizers(), self.device, self.batch_size, 1)

    with tempfile.TemporaryDirectory() as folder:
        trainer = package.Trainer(
            accelerator=bench.accelerator,
            devices=1,
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        found: int | None = tuner.Tuner(trainer).scale_batch_size(Module(), mode=mode)
    return found


def start_above(ceiling: int) -> int:
    """Return the power of two that is at least twice the ceiling.

    >>> start_above(100), start_above(128)
    (256, 256)
    """
    return int(2 ** (2 * ceiling - 1).bit_length())


def compare(
    workload: Workload, bench: Bench, findings: Findings, *, ceiling: int, cap_s: float = CAP_S
) -> None:
    """Let every finder that is installed search, one after the other."""
    start = start_above(ceiling)
    finders: dict[str, tuple[str, Callable[[Tried], int | None]]] = {
        "accelerate": ("accelerate", lambda tried: with_accelerate(workload, bench, tried, start)),
        "lightning power": (
            "lightning",
            lambda tried: with_lightning(workload, bench, tried, "power"),
        ),
        "lightning binsearch": (
            "lightning",
            lambda tried: with_lightning(workload, bench, tried, "binsearch"),
        ),
    }
    with findings.stage("warm-up"):
        PlainTraining(workload, bench.card.device).windows(2, 1)
    outcomes: list[dict[str, Any]] = []
    findings["start"] = start
    findings["finders"] = outcomes
    for name, (package, finder) in finders.items():
        with findings.stage(name), bench.limited(), _quietly():
            release = installed_version(package)
            if release is None:
                outcomes.append({"finder": name, "version": None})
            else:
                outcomes.append(
                    {"finder": name, "version": release, **_outcome(finder, bench, cap_s)}
                )
        gc.collect()
        bench.card.empty_cache()


def _outcome(finder: Callable[[Tried], int | None], bench: Bench, cap_s: float) -> dict[str, Any]:
    tried = Tried(bench.card, cap_s)
    started = time.perf_counter()
    found, ending = None, None
    try:
        found = finder(tried)
    except TimeIsUpError:
        ending = f"cut off after {cap_s:.0f} s"
    except Exception as error:
        ending = one_line(error)
    return {
        "found": found,
        "ending": ending,
        "executions": len(tried.rows),
        "ooms": sum(row["oom"] for row in tried.rows),
        "seconds": time.perf_counter() - started,
        "trials": tried.rows,
    }


def installed_version(package: str) -> str | None:
    """Return the version of what can be imported, or None."""
    try:
        if package == "lightning":
            found = lightning_package()
            return str(version(found.__name__.split(".")[0]))
        importlib.import_module(package)
        return version(package)
    except ImportError:
        return None


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Keep a library's advice out of the way."""
    names = ("lightning.pytorch", "pytorch_lightning", "lightning.fabric")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
            torch.set_grad_enabled(True)
