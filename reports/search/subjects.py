"""What the bench's processes train, and the plain loop that tells the truth about a size.

Invariant: nothing of the package takes part in the loop.
"""

from __future__ import annotations

import copy
import gc
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autobatch.support.oom import shortage_in

TARGET = 256
_SMALL = {
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 32_000,
}
_ENCODER = {"num_hidden_layers": 4, "max_position_embeddings": 1030}
LANGUAGE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {"n_layer": 4}),
    "llama": ("LlamaConfig", "LlamaForCausalLM", _SMALL),
    "bert": ("BertConfig", "BertForMaskedLM", _ENCODER),
    "roberta": ("RobertaConfig", "RobertaForMaskedLM", _ENCODER),
    "opt": ("OPTConfig", "OPTForCausalLM", {"num_hidden_layers": 4}),
    "t5": ("T5Config", "T5ForConditionalGeneration", {"decoder_start_token_id": 0}),
    "mistral": ("MistralConfig", "MistralForCausalLM", _SMALL),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", _SMALL),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {**_SMALL, "head_dim": 64}),
    "mixtral": (
        "MixtralConfig",
        "MixtralForCausalLM",
        {**_SMALL, "num_local_experts": 4, "intermediate_size": 512},
    ),
}
"""Language models by name: config and class of transformers, and changed defaults."""

_FOR_FINDERS = {"gpt2-small": ("GPT2Config", "GPT2LMHeadModel", {"n_layer": 2})}

VISION = (
    "vit_base_patch16_224",
    "deit_small_patch16_224",
    "beit_base_patch16_224",
    "swin_tiny_patch4_window7_224",
    "eva02_small_patch14_224",
    "cait_s24_224",
    "xcit_tiny_12_p16_224",
    "twins_svt_small",
    "hiera_tiny_224",
    "vit_base_patch16_clip_224",
)
"""Vision transformers of timm."""


@dataclass(frozen=True, slots=True)
class Subject:
    """What is trained: under bf16 autocast, by AdamW."""

    model: nn.Module
    sample: Any
    loss: Callable[[nn.Module, Any], Tensor]


def subject(name: str, length: int | None) -> Subject:
    """Build a model of `LANGUAGE` for sequences of a length, or one of timm."""
    if name in LANGUAGE or name in _FOR_FINDERS:
        transformers = importlib.import_module("transformers")
        kind, head, changed = (LANGUAGE | _FOR_FINDERS)[name]
        model = getattr(transformers, head)(getattr(transformers, kind)(**changed))
        words = torch.zeros(2, length or 512, dtype=torch.int64)
        return Subject(model, {"input_ids": words, "labels": words}, output_loss)
    model = importlib.import_module("timm").create_model(name)
    size = model.pretrained_cfg["input_size"][-1]
    images, labels = torch.zeros(2, 3, size, size), torch.zeros(2, dtype=torch.int64)
    return Subject(model, (images, labels), cross_entropy)


def output_loss(model: nn.Module, batch: Any) -> Tensor:
    loss: Tensor = model(**batch).loss
    return loss


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def batch_of(sample: Any, samples: int) -> Any:
    """Return a batch of zeros like a sample, on the card."""

    def grown(tensor: Tensor) -> Tensor:
        return torch.zeros(samples, *tensor.shape[1:], dtype=tensor.dtype).cuda()

    if isinstance(sample, dict):
        return {key: grown(value) for key, value in sample.items()}
    return tuple(map(grown, sample))


class PlainLoop:
    """The loop that people write, on the card; nothing of it is the package's."""

    def __init__(self, what: Subject):
        self._what = what
        self.model = copy.deepcopy(what.model).cuda().train()
        self._optimizer = torch.optim.AdamW(self.model.parameters())

    def update(self, micro_batch: int, steps: int = 1) -> None:
        """Run the micro-batches between two updates, and the update."""
        for _ in range(steps):
            self.forward_backward(micro_batch, 1 / steps)
        self.step()

    def forward_backward(self, micro_batch: int, weight: float) -> None:
        """Run one micro-batch, whose loss counts so much."""
        batch = batch_of(self._what.sample, micro_batch)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = self._what.loss(self.model, batch)
        (loss * weight).backward()

    def step(self) -> None:
        """Update the parameters, and drop the gradients."""
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)


def truth(what: Subject, micro_batch: int, steps: int) -> dict[str, Any]:
    """Run two updates in a plain loop, and tell what the allocator reserved for them."""
    emptied()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["num_alloc_retries"]
    oom = not ran_through(lambda: _two_updates(what, micro_batch, steps))
    stats = torch.cuda.memory_stats()
    found = {
        "micro_batch": micro_batch,
        "oom": oom,
        "alloc_retries": stats["num_alloc_retries"] - before,
        "reserved_bytes": stats["reserved_bytes.all.peak"],
    }
    emptied()
    return found


def _two_updates(what: Subject, micro_batch: int, steps: int) -> None:
    loop = PlainLoop(what)
    for _ in range(2):
        loop.update(micro_batch, steps)


def ran_through(run: Callable[[], Any]) -> bool:
    """Whether something runs without running out of memory."""
    try:
        run()
    except Exception as error:
        if shortage_in(error) is None:
            raise
        return False
    return True


def emptied() -> None:
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
