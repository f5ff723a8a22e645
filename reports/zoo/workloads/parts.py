"""What several workloads use: random tokens and images, small models from a config."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def tokens(samples: int, length: int, vocabulary: int = 8192) -> Tensor:
    """Return random token ids."""
    return torch.randint(3, vocabulary, (samples, length))


def images(samples: int, size: int, channels: int = 3) -> Tensor:
    """Return random images."""
    return torch.rand(samples, channels, size, size)


def llama(**changes: Any) -> Any:
    """Return a small Llama of transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = {
        "num_hidden_layers": 4,
        "hidden_size": 256,
        "intermediate_size": 688,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 8192,
        "max_position_embeddings": 1024,
        "attn_implementation": "eager",
        "use_cache": False,
    } | changes
    return LlamaForCausalLM(LlamaConfig(**config))


def tokenizer(size: int = 256) -> Any:
    """Return a tokenizer of made-up words, with special tokens and a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{n}" for n in range(size - 4))]
    made = Tokenizer(models.WordLevel({w: n for n, w in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )


def sentence(length: int) -> str:
    """Return words that the tokenizer knows."""
    return " ".join(f"w{n % 200}" for n in range(length))
