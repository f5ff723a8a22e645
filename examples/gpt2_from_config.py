"""Plan the training of a GPT-2-like language model on an A100 that is not in this machine.

The model comes from a config: its weights are random, nothing is downloaded, and on `meta` they
are not even allocated. Run it with `python examples/gpt2_from_config.py`.
"""

from __future__ import annotations

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import autobatch


def build() -> GPT2LMHeadModel:
    config = GPT2Config(n_layer=12, n_head=12, n_embd=768, n_positions=1024, vocab_size=50257)
    with torch.device("meta"):
        return GPT2LMHeadModel(config)


if __name__ == "__main__":
    plan = autobatch.tune(build(), target=512, gpu="a100-40gb", autocast="bf16", clip_norm=1.0)
    print(plan)
