"""Train a small CNN on scikit-learn's digits, for real and on the CPU, as a plan for a GPU says.

The card is imagined and tiny, so that an effective batch of 256 needs several micro-batches. The
loop is the one to copy: clipping, the update and the schedule once a window, a logged loss, and
the gradient of the whole effective batch, also where the last window of an epoch is short.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import autobatch

EPOCHS = 15
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

    model, data = build(), TensorDataset(images[training], labels[training])
    adamw = torch.optim.AdamW(model.parameters(), lr=8e-3)
    plan = autobatch.tune(
        model, target=256, sample=data, loss=loss, optimizer=adamw, clip_norm=1.0, gpu=CARD
    )
    print(f"{plan.micro_batch} x {plan.accumulation_steps} = {plan.effective_batch} samples")

    loader = DataLoader(data, batch_size=plan.micro_batch, shuffle=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adamw, T_max=EPOCHS * 6)
    for epoch in range(EPOCHS):
        for step, window in enumerate(plan.windows(loader, adamw, scheduler=schedule)):
            for batch in window:
                window.backward(loss(model, batch))
            window.step()
            if step == 0:
                print(f"epoch {epoch}: loss {window.loss:.3f}, norm {window.grad_norm:.2f}")

    right = model(images[held_out]).argmax(1) == labels[held_out]
    print(f"accuracy on {len(held_out)} held-out digits: {right.float().mean():.1%}")


if __name__ == "__main__":
    main()
