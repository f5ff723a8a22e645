"""Workloads of transformers' models, built from published configurations with no weights."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from autobatch.workload.workload import Workload
from reports.accuracy.steps.configuration import Step
from reports.accuracy.steps.published import CONFIGS


def build(name: str, dtype: str, attention: str, head: str | None = None, **more: Any) -> nn.Module:
    """Build a model on `meta` in a dtype; buffers that are not saved stay in fp32."""
    transformers = importlib.import_module("transformers")
    config_class, usual_head, options = CONFIGS[name]
    config = getattr(transformers, config_class)(**{**options, **more})
    model_class = getattr(transformers, head or usual_head)
    with torch.device("meta"):
        model: nn.Module = model_class._from_config(
            config, attn_implementation=attention, torch_dtype=getattr(torch, dtype)
        )
    return model


def docs_workload(step: Step) -> Workload:
    """Build what transformers' attention tables ran: the output lives until the next one."""
    told = step.options
    more = {"image_size": told["input"]} if len(told["input"]) == 2 else {}
    model = build(told["model"], told["dtype"], told["attention"], told["head"], **more)
    alive = SimpleNamespace()

    def batch(n: int) -> Mapping[str, Tensor]:
        if len(told["input"]) == 2:
            return {"pixel_values": torch.zeros(n, 3, *told["input"], dtype=torch.float16)}
        words = torch.randint(0, 1000, (n, *told["input"]))
        return {"input_ids": words, "attention_mask": torch.ones_like(words)}

    def window(model: nn.Module, optimizer: Any, batches: Any) -> None:
        for inputs in batches:
            alive.output = model(**inputs)
            alive.output.logits.sum().backward()
            for parameter in model.parameters():
                parameter.grad = None

    return Workload(
        model=model, batch=batch, optimizer=partial(torch.optim.SGD, lr=0.1), window=window
    )


def tuning_workload(step: Step) -> Workload:
    """Build what transformers' Trainer ran: its loss is detached, so that no graph outlives a step.

    Raises:
        ImportError: a LoRA asks for peft, which is not installed.
    """
    told = step.options
    model = build(told["model"], told["dtype"], "sdpa", use_cache=False)
    enable: Any = model.gradient_checkpointing_enable
    enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    if told["lora"]:
        model = _with_lora(model, told["lora"])

    def batch(n: int) -> Mapping[str, Tensor]:
        words = torch.randint(1, 1000, (n, told["length"]))
        return {"input_ids": words, "labels": words.clone()}

    def window(model: nn.Module, optimizer: Any, batches: Any) -> None:
        for inputs in batches:
            _loss(model, inputs).backward()
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return Workload(
        model=model,
        batch=batch,
        optimizer=partial(torch.optim.AdamW, lr=1e-5),
        window=window,
        world_size=step.world_size,
        sharding=told["sharding"],
    )


def _loss(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    outputs = model(**inputs)
    loss: Tensor = outputs.loss
    return loss


def _with_lora(model: Any, lora: Mapping[str, Any]) -> nn.Module:
    peft = importlib.import_module("peft")
    model.enable_input_require_grads()
    config = peft.LoraConfig(
        r=lora["r"],
        lora_alpha=lora["r"],
        lora_dropout=lora["dropout"],
        target_modules=lora["targets"],
        task_type="CAUSAL_LM",
    )
    wrapped: nn.Module = peft.get_peft_model(model, config)
    return wrapped
