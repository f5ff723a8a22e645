"""Let Lightning train with sizes that autobatch found, on scikit-learn's digits.

The card is imagined and tiny, the training real and on the CPU. The callback probes `training_step`
and sets the batch size and the accumulation steps; a partial last window keeps its whole gradient.
"""

from __future__ import annotations

import lightning
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import autobatch
from autobatch.integrations.lightning import AutobatchCallback

CARD = autobatch.GpuSpec(name="tiny-card", capacity_bytes=26 * 2**20)


class Digits(lightning.LightningModule):
    def __init__(self, images: Tensor, labels: Tensor) -> None:
        super().__init__()
        self.batch_size = 1  # the callback sets it
        self.data = TensorDataset(images, labels)
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10),
        )  # fmt: skip

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.data, batch_size=self.batch_size, shuffle=True)


def main() -> None:
    torch.set_num_threads(1)  # on images this small, threads only wait for each other
    torch.manual_seed(0)
    images, labels = map(torch.tensor, load_digits(return_X_y=True))
    images = images.float().view(-1, 1, 8, 8) / 16
    training, held_out = torch.randperm(len(labels)).split(1500)
    digits = Digits(images[training], labels[training])
    tuning = AutobatchCallback(target=256, gpu=CARD)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(accelerator="cpu", max_epochs=15, callbacks=[tuning], **quiet)
    trainer.fit(digits)
    plan = tuning.plan
    print(f"{plan.micro_batch} x {plan.accumulation_steps} = {plan.effective_batch} samples")
    right = digits.eval().net(images[held_out]).argmax(1) == labels[held_out]
    print(f"accuracy on {len(right)} held-out digits: {right.float().mean():.1%}")


if __name__ == "__main__":
    main()
