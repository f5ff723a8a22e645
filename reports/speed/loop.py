"""Measure what `Plan.windows` costs beside a loop written by hand.

    python -m reports.speed.loop [--json FILE] [--rounds N]

Both loops train the same small convolutional network on the digits of scikit-learn, on one thread
of the CPU, from the same loader: the same micro-batches, clipping, AdamW, schedule and logged loss.
They take turns, a block of windows each, so that both see the same machine; the figure is the
median over the rounds of the ratio of their times. Exit code 1 if it is above the target.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import autobatch

MICRO_BATCH, STEPS, WINDOWS = 64, 4, 7
TARGET = 1.01


class Training:
    """A model with its optimizer and schedule, and the loss of each window so far."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(2048, 10),
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda _: 1.0)
        self.losses: list[Tensor] = []

    def loss(self, batch: Sequence[Tensor]) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self.model(images), labels)


def by_hand(run: Training, loader: DataLoader[Any]) -> None:
    """The loop of most scripts; right here, as every window is whole."""
    total = torch.zeros(())
    for step, batch in enumerate(loader):
        loss = run.loss(batch) / STEPS
        loss.backward()
        total += loss.detach()
        if (step + 1) % STEPS == 0:
            nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
            run.optimizer.step()
            run.scheduler.step()
            run.optimizer.zero_grad()
            run.losses.append(total)
            total = torch.zeros(())


def windows_of(run: Training, loader: DataLoader[Any]) -> autobatch.Windows:
    return autobatch.windows(
        loader,
        run.optimizer,
        micro_batch=MICRO_BATCH,
        accumulation_steps=STEPS,
        scheduler=run.scheduler,
        clip_norm=1.0,
    )


def by_windows(run: Training, loader: DataLoader[Any]) -> None:
    for window in windows_of(run, loader):
        for batch in window:
            window.backward(run.loss(batch))
        window.step()
        run.losses.append(window.loss)


def by_function(run: Training, loader: DataLoader[Any]) -> None:
    """As `by_windows`, with recovery from a lack of memory."""
    for window in windows_of(run, loader):
        window.run(run.loss)
        window.step()
        run.losses.append(window.loss)


LOOPS: dict[str, Callable[[Training, DataLoader[Any]], None]] = {
    "by hand": by_hand,
    "for batch in window": by_windows,
    "window.run": by_function,
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=200)
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    seconds = measure(chosen.rounds)
    figures = {name: _ratio(seconds[name], seconds["by hand"]) for name in list(LOOPS)[1:]}
    for name, figure in figures.items():
        low, middle, high = figure["quartiles"]
        print(f"{name}: {middle:.4f} of the loop by hand (quartiles {low:.4f} to {high:.4f})")
    if chosen.json:
        result = {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "micro_batch": MICRO_BATCH,
            "accumulation_steps": STEPS,
            "rounds": chosen.rounds,
            "milliseconds_a_window_by_hand": round(1e3 * median(seconds["by hand"]) / WINDOWS, 3),
            "target": TARGET,
            "ratios": figures,
        }
        chosen.json.write_text(json.dumps(result, indent=2) + "\n")
    return int(any(figure["quartiles"][1] > TARGET for figure in figures.values()))


def measure(rounds: int) -> dict[str, list[float]]:
    """Return the processor seconds of each loop's blocks, and check that they train alike."""
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(
        torch.tensor(images / 16, dtype=torch.float32).view(-1, 1, 8, 8)[: _samples()],
        torch.tensor(labels)[: _samples()],
    )
    loader = DataLoader(data, batch_size=MICRO_BATCH)
    runs = {name: Training() for name in LOOPS}
    seconds: dict[str, list[float]] = {name: [] for name in LOOPS}
    for turn in range(rounds + 1):
        order = list(LOOPS) if turn % 2 else list(LOOPS)[::-1]
        for name in order:
            started = time.process_time()
            LOOPS[name](runs[name], loader)
            if turn:  # the first warms up
                seconds[name].append(time.process_time() - started)
    reference = torch.stack(runs["by hand"].losses)
    for run in runs.values():
        torch.testing.assert_close(torch.stack(run.losses), reference, rtol=1e-3, atol=1e-4)
    return seconds


def _samples() -> int:
    return MICRO_BATCH * STEPS * WINDOWS


def _ratio(seconds: Sequence[float], reference: Sequence[float]) -> dict[str, list[float]]:
    ratios = [a / b for a, b in zip(seconds, reference, strict=True)]
    return {"quartiles": [round(value, 5) for value in quantiles(ratios, n=4)]}


if __name__ == "__main__":
    raise SystemExit(main())
