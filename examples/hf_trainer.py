"""Let transformers' Trainer train with sizes that autobatch found: a GPT that reverses numbers.

The card is imagined and tiny, the training real and on the CPU. `tune_trainer` probes what
`trainer.train()` will run, and sets the micro-batch and the accumulation steps before the
dataloader and the learning-rate schedule are made from them.
"""

from __future__ import annotations

from tempfile import mkdtemp

import torch
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

import autobatch
from autobatch.integrations.transformers import tune_trainer

CARD = autobatch.GpuSpec(name="tiny-card", capacity_bytes=40 * 2**20)


class Reversals(Dataset):
    """Three digits, a separator, and the digits in reverse, which are what is to be learned."""

    def __init__(self, numbers: list[int]) -> None:
        self.numbers = numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        digits = [int(digit) for digit in f"{self.numbers[index]:03}"]
        tokens = torch.tensor([*digits, 10, *reversed(digits)])
        return {"input_ids": tokens, "labels": tokens.where(torch.arange(7) > 3, -100)}


def main() -> None:
    torch.set_num_threads(1)  # on a model this small, threads only wait for each other
    set_seed(0)
    sizes = {"n_layer": 2, "n_head": 4, "n_embd": 64, "n_positions": 7, "vocab_size": 11}
    config = GPT2Config(**sizes, bos_token_id=None, eos_token_id=None, use_cache=False)
    arguments = TrainingArguments(
        output_dir=mkdtemp(), use_cpu=True, num_train_epochs=30, learning_rate=6e-3,
        save_strategy="no", report_to=[], disable_tqdm=True,
    )  # fmt: skip
    numbers = torch.randperm(1000).tolist()
    training, held_out = Reversals(numbers[:768]), Reversals(numbers[768:])  # 3 windows of 256
    trainer = Trainer(GPT2LMHeadModel(config), arguments, train_dataset=training)
    plan = tune_trainer(trainer, target=256, gpu=CARD)
    print(f"{plan.micro_batch} x {plan.accumulation_steps} = {plan.effective_batch} samples")
    print(f"{trainer.train().global_step} updates")

    tokens = torch.stack([sample["input_ids"] for sample in held_out])
    answers = trainer.model.eval()(tokens).logits[:, 3:6].argmax(2)
    right = (answers == tokens[:, 4:]).all(1).float().mean()
    print(f"reversed {len(tokens)} numbers that were held out: {right:.1%} right")


if __name__ == "__main__":
    main()
