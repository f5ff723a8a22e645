"""Plan a 7 B language model on 8 A100-40 with FSDP2, on a machine that has none of them.

Layers are recomputed in backward, gathered in bf16 and kept in fp32. Run it with
`python examples/llama_on_8_gpus.py`, or with other sizes and cards:
`autobatch probe examples/llama_on_8_gpus.py:build --target 512 --gpu h100-80gb --world-size 16`.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

import autobatch

SEQUENCE = 2048


def shard(model: nn.Module) -> None:
    bf16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer, mp_policy=bf16)
    fully_shard(model, mp_policy=bf16)


def tokens(n: int) -> dict[str, torch.Tensor]:
    ids = torch.ones(n, SEQUENCE, dtype=torch.int64)
    return {"input_ids": ids, "labels": ids}


def build(layers: int = 32) -> autobatch.Workload:
    config = LlamaConfig(num_hidden_layers=layers, use_cache=False)  # else as Llama 7 B
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return autobatch.Workload(
        model=model,
        batch=tokens,
        loss=lambda model, batch: model(**batch).loss,
        clip_norm=1.0,
        world_size=8,
        sharding=shard,
    )


if __name__ == "__main__":
    print(autobatch.tune(build(), target=256, gpu="a100-40gb"))
