"""Published configurations of language models, as their authors state them, and the layers of each.

A configuration class of transformers, a head, and what differs from the class's defaults.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

Config = tuple[str, str, Mapping[str, Any]]


def _llama(
    width: int,
    inner: int,
    layers: int,
    heads: int,
    groups: int,
    words: int,
    *,
    config: str = "Llama",
    **more: Any,
) -> Config:
    options = {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "vocab_size": words,
    }
    return f"{config}Config", f"{config}ForCausalLM", options | more


def _pythia(width: int, layers: int, heads: int, words: int = 50_304) -> Config:
    options = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
        "vocab_size": words,
    }
    return "GPTNeoXConfig", "GPTNeoXForCausalLM", options


def _opt(width: int, layers: int, heads: int, **more: Any) -> Config:
    options = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "ffn_dim": 4 * width,
    }
    return "OPTConfig", "OPTForCausalLM", options | more


def _gpt2(width: int, layers: int, heads: int) -> Config:
    return "GPT2Config", "GPT2LMHeadModel", {"n_embd": width, "n_layer": layers, "n_head": heads}


_ALBERT = {
    "hidden_size": 768,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_dropout_prob": 0,
    "attention_probs_dropout_prob": 0,
    "classifier_dropout_prob": 0.1,
}
_BEIT = {
    "use_relative_position_bias": True,
    "layer_scale_init_value": 0.1,
    "num_labels": 1000,
}
CONFIGS: Mapping[str, Config] = {
    "mistral-7b": _llama(4096, 14336, 32, 32, 8, 32_000, config="Mistral", sliding_window=4096),
    "mistral-7b-v0.2": _llama(4096, 14336, 32, 32, 8, 32_000, config="Mistral"),
    "mixtral-8x7b": _llama(4096, 14336, 32, 32, 8, 32_000, config="Mixtral", sliding_window=None),
    "llama-2-7b": _llama(4096, 11008, 32, 32, 32, 32_000),
    "llama-2-13b": _llama(5120, 13824, 40, 40, 40, 32_000),
    "llama-2-70b": _llama(8192, 28672, 80, 64, 8, 32_000),
    "llama-3-8b": _llama(4096, 14336, 32, 32, 8, 128_256),
    "llama-3-70b": _llama(8192, 28672, 80, 64, 8, 128_256),
    "llama-3-405b": _llama(16384, 53248, 126, 128, 8, 128_256),
    "llama-3.2-1b": _llama(2048, 8192, 16, 32, 8, 128_256, tie_word_embeddings=True),
    "llama-3.2-3b": _llama(3072, 8192, 28, 24, 8, 128_256, tie_word_embeddings=True),
    "tinyllama-1.1b": _llama(2048, 5632, 22, 32, 4, 32_000),
    "yi-34b": _llama(7168, 20480, 60, 56, 8, 64_000),
    "qwen2.5-7b": _llama(3584, 18944, 28, 28, 4, 152_064, config="Qwen2"),
    "qwen2.5-1.5b": _llama(
        1536, 8960, 28, 12, 2, 151_936, config="Qwen2", tie_word_embeddings=True
    ),
    "gemma-2b": _llama(2048, 16384, 18, 8, 1, 256_000, config="Gemma", head_dim=256),
    "gemma-7b": _llama(3072, 24576, 28, 16, 16, 256_000, config="Gemma", head_dim=256),
    "powerlm-3b": _llama(
        2304, 9216, 40, 36, 36, 49_152, config="Granite", tie_word_embeddings=True
    ),
    "opt-125m": _opt(768, 12, 12),
    "opt-350m": _opt(1024, 24, 16, word_embed_proj_dim=512, do_layer_norm_before=False),
    "opt-1.3b": _opt(2048, 24, 32),
    "pythia-160m": _pythia(768, 12, 12),
    "pythia-410m": _pythia(1024, 24, 16),
    "pythia-1b": _pythia(2048, 16, 8),
    "pythia-1.4b": _pythia(2048, 24, 16),
    "gpt2": _gpt2(768, 12, 12),
    "gpt2-medium": _gpt2(1024, 24, 16),
    "gpt2-large": _gpt2(1280, 36, 20),
    "bert-base": ("BertConfig", "BertLMHeadModel", {}),
    "roberta-base": (
        "RobertaConfig",
        "RobertaForMaskedLM",
        {"vocab_size": 50_265, "max_position_embeddings": 514, "type_vocab_size": 1},
    ),
    "albert-base": ("AlbertConfig", "AlbertForMaskedLM", _ALBERT),
    "beit-base-patch16": ("BeitConfig", "BeitForImageClassification", _BEIT),
}
_TAILS = re.compile(
    r"(-deduped|-hf|-instruct|-v0\.1|-v2|-uncased|-cased|-224|-4k|-512|-chat|-gptq)+$"
)


def published(name: str) -> str | None:
    """Return the name under which a model's configuration is known here; None where it is not.

    >>> published("mistralai/Mixtral-8x7B-Instruct-v0.1"), published("Llama-3.1-8B")
    ('mixtral-8x7b', 'llama-3-8b')
    """
    short = name.rpartition("/")[2].strip().lower().replace(" ", "-").replace("_", "-")
    short = re.sub(r"^meta-", "", short)
    short = short.replace("llama-3.1-", "llama-3-").replace("llama3.1-", "llama-3-")
    short = re.sub(r"^llama(\d)", r"llama-\1", short)
    if short in CONFIGS:
        return short
    cut = _TAILS.sub("", short)
    return cut if cut in CONFIGS else None
