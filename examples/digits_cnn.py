"""Train a small CNN on scikit-learn's digits, for real and on the CPU, as a plan for a GPU says.

The card is imagined and tiny, so that an effective batch of 256 needs several micro-batches. The
loop is the one to copy: every micro-batch counts by its share of the window, so the gradient is
that of the whole effective batch, also where the sizes differ or the last window is short.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import autobatch

EPOCHS = 10
CARD = autobatch.GpuSpec(name="tiny-card", capacity_bytes=28 * 2**20)


def build() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Flatten(),
        nn.Linear(32 * 4 * 4, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    images, labels = batch
    return F.cross_entropy(model(images), labels)


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # on images this small, threads only wait for each other
    images, labels = map(torch.tensor, load_digits(return_X_y=True))
    images = images.float().view(-1, 1, 8, 8) / 16
    order = torch.randperm(len(labels))
    training, held_out = order[:1500], order[1500:]

    model, sample = build(), (images[training], labels[training])
    adamw = torch.optim.AdamW(model.parameters(), lr=5e-3)
    plan = autobatch.tune(model, target=256, sample=sample, loss=loss, optimizer=adamw, gpu=CARD)
    print(f"{plan.micro_batch} x {plan.accumulation_steps} = {plan.effective_batch} samples")

    for _ in range(EPOCHS):
        for window in training[torch.randperm(len(training))].split(plan.effective_batch):
            for part in window.split(plan.micro_batch):
                share = len(part) / len(window)
                (loss(model, (images[part], labels[part])) * share).backward()
            adamw.step()
            adamw.zero_grad()

    right = model(images[held_out]).argmax(1) == labels[held_out]
    print(f"accuracy on {len(held_out)} held-out digits: {right.float().mean():.1%}")


if __name__ == "__main__":
    main()
