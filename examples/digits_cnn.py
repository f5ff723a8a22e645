"""Train a small CNN on scikit-learn's digits, for real and on the CPU, as a plan for a GPU says.

The card is imagined and tiny, so that an effective batch of 256 needs several micro-batches. The
loop is the one to copy: every micro-batch counts by its share of the window, so that the gradient
is that of the whole effective batch, also where the sizes differ or the last window is short.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import autobatch

EPOCHS = 12
CARD = autobatch.GpuSpec(name="tiny-card", capacity_bytes=40 * 2**20)


def build() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64 * 4 * 4, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    images, labels = batch
    return F.cross_entropy(model(images), labels)


def main() -> None:
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(labels))
    training, held_out = order[:1500], order[1500:]

    model, data = build(), TensorDataset(images[training], labels[training])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    plan = autobatch.tune(model, target=256, sample=data, loss=loss, optimizer=optimizer, gpu=CARD)
    print(f"{plan.micro_batch} x {plan.accumulation_steps} = {plan.effective_batch} samples")

    for _ in range(EPOCHS):
        for window in training[torch.randperm(len(training))].split(plan.effective_batch):
            for part in window.tensor_split(plan.accumulation_steps):
                share = len(part) / len(window)
                (loss(model, (images[part], labels[part])) * share).backward()
            optimizer.step()
            optimizer.zero_grad()

    with torch.no_grad():
        right = model(images[held_out]).argmax(1) == labels[held_out]
    print(f"accuracy on {len(held_out)} held-out digits: {right.float().mean():.1%}")


if __name__ == "__main__":
    main()
