# needs: accelerate
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from autobatch.integrations.transformers import AutobatchCallback

config = GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=64, n_positions=16)
model = GPT2LMHeadModel(config)


class Rows(list):
    """A data set with the methods of `datasets.Dataset` that the page calls."""

    def shuffle(self, seed):
        return self

    def select(self, indices):
        return Rows(self[i] for i in indices)


data = Rows({"input_ids": torch.arange(16), "labels": torch.arange(16)} for _ in range(300))
plan = autobatch.tune(model, target=256, gpu="t4", clip_norm=1.0)
plan.save("plan.json")
arguments = TrainingArguments("run", max_steps=1, report_to=[])
