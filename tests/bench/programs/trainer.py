"""transformers' Trainer, tuned for the GPU in the machine, then trained with what was found."""

from __future__ import annotations

import sys
import tempfile

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from autobatch.integrations.transformers import tune_trainer
from tests.bench.programs import tell


class Texts(Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 4096

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = torch.arange(128)
        return {"input_ids": tokens, "labels": tokens}


def main() -> None:
    config = GPT2Config(n_layer=2, n_embd=256, n_head=4, vocab_size=5000, n_positions=128)
    arguments = TrainingArguments(
        tempfile.mkdtemp(),
        max_steps=2,
        **{sys.argv[1]: True},
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = Trainer(GPT2LMHeadModel(config), arguments, train_dataset=Texts())
    plan = tune_trainer(trainer, target=512)
    torch.cuda.reset_peak_memory_stats()
    trainer.train()
    tell(
        {
            "plan": [plan.micro_batch, plan.accumulation_steps],
            "set": [
                trainer.args.per_device_train_batch_size,
                trainer.args.gradient_accumulation_steps,
            ],
            "ooms": plan.ooms,
            "planned": plan.footprint.peak_allocated_bytes,
            "trained": torch.cuda.max_memory_allocated(),
        }
    )


if __name__ == "__main__":
    main()
