"""Train a small CNN on scikit-learn's digits, for real and on the CPU, as a plan for a GPU says.

The card is imagined and tiny, so that an effective batch of 256 needs several micro-batches. The
loop is the one to copy; the gradient is exact in the short last window of an epoch, too.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split

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
    everything = TensorDataset(images.float().view(-1, 1, 8, 8) / 16, labels)
    data, held_out = random_split(everything, [1500, 297])
    model = build()
    adamw = torch.optim.AdamW(model.parameters(), lr=8e-3)
    given = {"sample": data, "loss": loss, "optimizer": adamw, "clip_norm": 1.0}
    plan = autobatch.tune(model, target=256, gpu=CARD, **given)
    print(f"{plan.micro_batch} x {plan.accumulation_steps} = {plan.effective_batch} samples")

    loader = DataLoader(data, batch_size=plan.micro_batch, shuffle=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adamw, T_max=EPOCHS * 6)
    windows = plan.windows(loader, adamw, scheduler=schedule)
    for epoch in range(EPOCHS):
        for window in windows:
            for batch in window:
                window.backward(loss(model, batch))
            window.step()
        print(f"epoch {epoch}: loss {window.loss:.3f}, norm {window.grad_norm:.2f}")
    right = model(held_out[:][0]).argmax(1) == held_out[:][1]
    print(f"accuracy on {len(held_out)} held-out digits: {right.float().mean():.1%}")


if __name__ == "__main__":
    main()
