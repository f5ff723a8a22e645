"""Published configurations of the language models that xMem ran, as their authors state them.

A config class, a head, and what differs from the class's defaults.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Config = tuple[str, str, Mapping[str, Any]]

_NO_DROPOUT = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
_QWEN3 = {
    "vocab_size": 151_936,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40_960,
    "tie_word_embeddings": True,
}


def _t5(**options: Any) -> Config:
    return "T5Config", "T5ForConditionalGeneration", {"decoder_start_token_id": 0, **options}


def _gpt2(**options: Any) -> Config:
    return "GPT2Config", "GPT2LMHeadModel", options


def _cerebras(width: int, layers: int, heads: int) -> Config:
    return _gpt2(
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        n_inner=4 * width,
        n_positions=2048,
        activation_function="gelu",
        **_NO_DROPOUT,
    )


def _qwen3(width: int, layers: int, heads: int, inner: int) -> Config:
    options = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": inner,
    }
    return "Qwen3Config", "Qwen3ForCausalLM", options | _QWEN3


def _llama32(width: int, layers: int, heads: int, head_dim: int) -> Config:
    options = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "head_dim": head_dim,
        "intermediate_size": 8192,
        "vocab_size": 128_256,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131_072,
        "tie_word_embeddings": True,
    }
    return "LlamaConfig", "LlamaForCausalLM", options


def _pythia(width: int, layers: int, heads: int) -> Config:
    options = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
        "vocab_size": 50_304,
    }
    return "GPTNeoXConfig", "GPTNeoXForCausalLM", options


CONFIGS: Mapping[str, Config] = {
    "T5-small": _t5(),
    "T5-base": _t5(d_model=768, d_ff=3072, num_layers=12, num_heads=12),
    "EleutherAI/gpt-neo-125M": (
        "GPTNeoConfig",
        "GPTNeoForCausalLM",
        {
            "hidden_size": 768,
            "num_layers": 12,
            "num_heads": 12,
            "attention_types": [[["global", "local"], 6]],
        },
    ),
    "EleutherAI/pythia-160m": _pythia(768, 12, 12),
    "EleutherAI/pythia-410m": _pythia(1024, 24, 16),
    "EleutherAI/pythia-1b": _pythia(2048, 16, 8),
    "cerebras/Cerebras-GPT-111M": _cerebras(768, 10, 12),
    "cerebras/Cerebras-GPT-256M": _cerebras(1088, 14, 17),
    "distilbert/distilgpt2": _gpt2(n_layer=6),
    "openai-community/gpt2": _gpt2(),
    "openai-community/gpt2-medium": _gpt2(n_embd=1024, n_layer=24, n_head=16),
    "facebook/opt-125m": ("OPTConfig", "OPTForCausalLM", {}),
    "facebook/opt-350m": (
        "OPTConfig",
        "OPTForCausalLM",
        {
            "hidden_size": 1024,
            "ffn_dim": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "word_embed_proj_dim": 512,
            "do_layer_norm_before": False,
        },
    ),
    "Qwen/Qwen3-0.6B": _qwen3(1024, 28, 16, 3072),
    "Qwen/Qwen3-1.7B": _qwen3(2048, 28, 16, 6144),
    "Qwen/Qwen3-4B": _qwen3(2560, 36, 32, 9728),
    "meta-llama/Llama-3.2-1B-Instruct": _llama32(2048, 16, 32, 64),
    "meta-llama/Llama-3.2-3B-Instruct": _llama32(3072, 28, 24, 128),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": (
        "Qwen2Config",
        "Qwen2ForCausalLM",
        {
            "hidden_size": 1536,
            "num_hidden_layers": 28,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "intermediate_size": 8960,
            "vocab_size": 151_936,
            "max_position_embeddings": 131_072,
        },
    ),
}
