"""Lightning's Trainer with the callback that tunes it for the GPU in the machine."""

from __future__ import annotations

import sys

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from autobatch.integrations.lightning import AutobatchCallback
from tests.bench.programs import tell

WIDTH = 512


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.batch_size = 1
        layers = nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        self.layers = nn.Sequential(nn.Embedding(100, WIDTH), *layers)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return self.layers(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters())

    def train_dataloader(self) -> DataLoader:
        rows = torch.arange(2**15).remainder(100)
        return DataLoader(TensorDataset(rows), batch_size=self.batch_size)


def main() -> None:
    callback = AutobatchCallback(target=2**14)
    module = Module()
    trainer = lightning.Trainer(
        max_steps=2,
        accelerator="gpu",
        precision=sys.argv[1],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback],
    )
    trainer.fit(module)
    plan = callback.plan
    assert plan is not None
    tell(
        {
            "plan": [plan.micro_batch, plan.accumulation_steps],
            "set": [module.batch_size, trainer.accumulate_grad_batches],
            "ooms": plan.ooms,
            "planned": plan.footprint.peak_allocated_bytes,
            "trained": torch.cuda.max_memory_allocated(),
        }
    )


if __name__ == "__main__":
    main()
