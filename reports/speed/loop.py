"""Measure what `Plan.windows` costs beside a loop written by hand.

    python -m reports.speed.loop [--json FILE] [--rounds N] [--only CASE ...]

Three models train on one thread of the CPU: a convolutional network on the digits of scikit-learn,
with clipping, a schedule and a logged loss; a network of 100 layers; and a single layer, of which a
micro-batch takes some 50 µs. The loops see the same batches and take turns, so that both see the
same machine. Figures are medians over the rounds: the ratio of their processor times, and the
difference for each micro-batch. Exit code 1 if one is above its target.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import autobatch
from reports.common.results import today


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A model, its batches and how it is trained.

    Attributes:
        model: builds it.
        batches: makes what a round goes through, in micro-batches.
        size: samples of a micro-batch.
        steps: micro-batches of a window.
        is_whole: whether gradients are clipped, a schedule is stepped and losses are logged.
        most_ratio: target for the ratio of times, or None.
        most_us: target for the difference for each micro-batch, in microseconds, or None.
    """

    model: Callable[[], nn.Module]
    batches: Callable[[], Iterable[Any]]
    size: int
    steps: int
    is_whole: bool = False
    most_ratio: float | None = None
    most_us: float | None = None


def _digits() -> Iterable[Any]:
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(
        torch.tensor(images / 16, dtype=torch.float32).view(-1, 1, 8, 8)[: 64 * 28],
        torch.tensor(labels)[: 64 * 28],
    )
    return DataLoader(data, batch_size=64)


def _convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(2048, 10),
    )


def _layers(count: int) -> nn.Module:
    return nn.Sequential(*[nn.Linear(16, 16) for _ in range(count)])


CASES = {
    "convolutions": Case(
        model=_convolutions, batches=_digits, size=64, steps=4, is_whole=True, most_ratio=1.01
    ),
    "100 layers": Case(
        model=lambda: _layers(100),
        batches=lambda: list(torch.randn(4 * 160, 16).split(4)),
        size=4,
        steps=8,
        most_ratio=1.01,
    ),
    "one layer": Case(
        model=lambda: _layers(1),
        batches=lambda: list(torch.randn(4 * 1600, 16).split(4)),
        size=4,
        steps=8,
        most_us=10,
    ),
}


class Training:
    """A model with its optimizer and schedule, and the loss of each window so far."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        self.case = case
        self.model = case.model()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda _: 1.0)
        self.losses: list[Tensor] = []

    def loss(self, batch: Any) -> Tensor:
        if self.case.is_whole:
            images, labels = batch
            return nn.functional.cross_entropy(self.model(images), labels)
        loss: Tensor = self.model(batch).square().mean()
        return loss


def by_hand(run: Training, batches: Iterable[Any]) -> None:
    """The loop of most scripts; right here, as every window is whole."""
    steps, is_whole = run.case.steps, run.case.is_whole
    total = torch.zeros(())
    for step, batch in enumerate(batches):
        loss = run.loss(batch) / steps
        loss.backward()
        if is_whole:
            total += loss.detach()
        if (step + 1) % steps == 0:
            if is_whole:
                nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
            run.optimizer.step()
            if is_whole:
                run.scheduler.step()
            run.optimizer.zero_grad()
            if is_whole:
                run.losses.append(total)
                total = torch.zeros(())


def windows_of(run: Training, batches: Iterable[Any]) -> autobatch.Windows:
    case = run.case
    return autobatch.windows(
        batches,
        run.optimizer,
        micro_batch=case.size,
        accumulation_steps=case.steps,
        scheduler=run.scheduler if case.is_whole else None,
        clip_norm=1.0 if case.is_whole else None,
    )


def by_windows(run: Training, batches: Iterable[Any]) -> None:
    for window in windows_of(run, batches):
        for batch in window:
            window.backward(run.loss(batch))
        window.step()
        if run.case.is_whole:
            run.losses.append(window.loss)


def by_function(run: Training, batches: Iterable[Any]) -> None:
    """As `by_windows`, with recovery from a lack of memory."""
    for window in windows_of(run, batches):
        window.run(run.loss)
        window.step()
        if run.case.is_whole:
            run.losses.append(window.loss)


LOOPS: dict[str, Callable[[Training, Iterable[Any]], None]] = {
    "by hand": by_hand,
    "for batch in window": by_windows,
    "window.run": by_function,
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), metavar="CASE")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    results = {name: measured(CASES[name], chosen.rounds) for name in chosen.only}
    for name, result in results.items():
        print(f"{name}: {result['by_hand_us']:.1f} µs a micro-batch by hand")
        for loop, figures in result["loops"].items():
            (low, middle, high), more = figures["ratio"], figures["more_us"]
            best = figures["best_ratio"]
            print(
                f"  {loop}: {middle:.4f} times that (quartiles {low:.4f} to {high:.4f}), "
                f"{more[1]:+.1f} µs ({more[0]:+.1f} to {more[2]:+.1f}); best rounds {best:.4f}"
            )
    if chosen.json:
        facts = {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "date": today(),
            "rounds": chosen.rounds,
            "cases": results,
        }
        chosen.json.write_text(json.dumps(facts, indent=2) + "\n")
    return int(not all(result["is_within_target"] for result in results.values()))


def measured(case: Case, rounds: int) -> dict[str, Any]:
    """Return the figures of a case."""
    seconds, count = timed(case, rounds)
    hand = seconds.pop("by hand")
    loops = {}
    for name, own in seconds.items():
        pairs = list(zip(own, hand, strict=True))
        loops[name] = {
            "ratio": [round(value, 5) for value in quantiles([a / b for a, b in pairs], n=4)],
            "more_us": [
                round(1e6 * value / count, 2) for value in quantiles([a - b for a, b in pairs], n=4)
            ],
            "best_ratio": round(min(own) / min(hand), 5),
        }
    # the loop that recovers takes the random states and copies buffers, once a window
    first = loops["for batch in window"]
    return {
        "by_hand_us": round(1e6 * quantiles(hand, n=4)[1] / count, 2),
        "loops": loops,
        "most_ratio": case.most_ratio,
        "most_us": case.most_us,
        "is_within_target": (case.most_ratio is None or first["ratio"][1] <= case.most_ratio)
        and (case.most_us is None or first["more_us"][1] <= case.most_us),
    }


def timed(case: Case, rounds: int) -> tuple[dict[str, list[float]], int]:
    """Return the processor seconds of each loop's rounds, and the micro-batches of one.

    The loops are checked to train alike.
    """
    batches = case.batches()
    runs = {name: Training(case) for name in LOOPS}
    seconds: dict[str, list[float]] = {name: [] for name in LOOPS}
    for turn in range(rounds + 1):
        for name in list(LOOPS)[:: 1 if turn % 2 else -1]:
            started = time.process_time()
            LOOPS[name](runs[name], batches)
            if turn:  # the first warms up
                seconds[name].append(time.process_time() - started)
    reference = [p.detach() for p in runs["by hand"].model.parameters()]
    for run in runs.values():
        for ours, theirs in zip(run.model.parameters(), reference, strict=True):
            torch.testing.assert_close(ours.detach(), theirs, rtol=1e-2, atol=1e-3)
        if run.losses:
            torch.testing.assert_close(
                torch.stack(run.losses), torch.stack(runs["by hand"].losses), rtol=1e-3, atol=1e-4
            )
    return seconds, sum(1 for _ in batches)


if __name__ == "__main__":
    raise SystemExit(main())
