"""Finetuning of few parameters, quantized bases, distillation."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reports.zoo.entries import Step, step, workload
from reports.zoo.workloads.parts import images, llama, tokens


def _adapted(config: Any, **options: Any) -> Step:
    from peft import get_peft_model

    model = get_peft_model(llama(), config)
    ids = tokens(2, 128)
    return step(model, target=256, sample={"input_ids": ids, "labels": ids}, **options)


@workload("peft", "transformers")
def lora() -> Step:
    """LoRA on the attention of a Llama."""
    from peft import LoraConfig

    return _adapted(LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=["q_proj", "v_proj"]))


@workload("peft", "transformers")
def dora() -> Step:
    """DoRA on every linear layer."""
    from peft import LoraConfig

    return _adapted(
        LoraConfig(task_type="CAUSAL_LM", r=8, use_dora=True, target_modules="all-linear")
    )


@workload("peft", "transformers")
def ia3() -> Step:
    """IA3, which scales what layers give."""
    from peft import IA3Config

    return _adapted(
        IA3Config(
            task_type="CAUSAL_LM",
            target_modules=["k_proj", "v_proj", "down_proj"],
            feedforward_modules=["down_proj"],
        )
    )


@workload("peft", "transformers")
def prompt_tuning() -> Step:
    """Prompt tuning: virtual tokens are all that learns."""
    from peft import PromptTuningConfig

    return _adapted(PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=16))


@workload("peft", "transformers")
def lora_checkpointed() -> Step:
    """LoRA over a bf16 base with gradient checkpointing, as scripts of 7B models do."""
    from peft import LoraConfig, get_peft_model

    base = llama().to(torch.bfloat16)
    base.gradient_checkpointing_enable()
    base.enable_input_require_grads()
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    ids = tokens(2, 128)
    return step(model, target=256, sample={"input_ids": ids, "labels": ids})


@workload("bitsandbytes", "peft", "transformers")
def qlora() -> Step:
    """QLoRA: an nf4 base that bitsandbytes quantized on the CPU."""
    import bitsandbytes as bnb
    from peft import LoraConfig, get_peft_model

    base = llama().to(torch.bfloat16)
    for name, layer in list(base.named_modules()):
        if isinstance(layer, nn.Linear) and "lm_head" not in name:
            quantized = bnb.nn.Linear4bit(
                layer.in_features,
                layer.out_features,
                bias=False,
                compute_dtype=torch.bfloat16,
                quant_type="nf4",
            )
            quantized.weight = bnb.nn.Params4bit(
                layer.weight.data, requires_grad=False, quant_type="nf4"
            )
            parent, _, child = name.rpartition(".")
            setattr(base.get_submodule(parent), child, quantized.to("cpu"))
    model = get_peft_model(
        base, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])
    )
    ids = tokens(2, 128)
    return step(
        model,
        target=256,
        sample={"input_ids": ids, "labels": ids},
        on_cpu="bitsandbytes takes other kernels on the CPU",
        state=2.0,
    )


@workload("torchao", "transformers")
def int8_base() -> Step:
    """An int8 base of torchao of which the head alone is trained."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = llama().to(torch.bfloat16)
    quantize_(model.model.layers, Int8WeightOnlyConfig())
    for parameter in model.model.parameters():
        parameter.requires_grad_(False)
    ids = tokens(2, 128)
    return step(
        model,
        target=256,
        sample={"input_ids": ids, "labels": ids},
        on_cpu="torchao takes other kernels on the CPU",
        state=2.0,
    )


@workload("torchao", "transformers")
def float8() -> Step:
    """float8 training of torchao on an H100."""
    from torchao.float8 import convert_to_float8_training

    model = llama().to(torch.bfloat16)
    convert_to_float8_training(model.model)
    ids = tokens(2, 128)
    return step(
        model,
        target=512,
        gpu="h100-80gb",
        sample={"input_ids": ids, "labels": ids},
        on_cpu="float8 products need an H100",
        state=2.0,
    )


@workload("torchvision")
def distillation() -> Step:
    """A student that learns from a teacher which the loss closes over."""
    from torchvision.models import resnet18, resnet34

    teacher = resnet34(num_classes=100).eval().requires_grad_(False)
    temperature = 4.0

    def loss(student: nn.Module, batch: Any) -> Tensor:
        x, labels = batch
        with torch.no_grad():
            soft = (teacher(x) / temperature).softmax(-1)
        logits = student(x)
        hard = F.cross_entropy(logits, labels)
        return hard + F.kl_div((logits / temperature).log_softmax(-1), soft, reduction="batchmean")

    return step(
        resnet18(num_classes=100),
        target=512,
        sample=(images(2, 64), torch.randint(100, (2,))),
        loss=loss,
        optimizer="sgd",
        state=0.0,
    )


class _Distiller:
    """A trainer of one's own, which holds the teacher."""

    def __init__(self, teacher: nn.Module) -> None:
        self.teacher = teacher
        self.losses: list[float] = []

    def loss(self, student: nn.Module, batch: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = self.teacher(batch)
        loss = F.mse_loss(student(batch), wanted)
        self.losses.append(loss.item())
        return loss


@workload("timm")
def distiller_object() -> Step:
    """Distillation by a bound method of an object that holds the teacher and a log."""
    import timm

    teacher = timm.create_model("vit_small_patch16_224", img_size=96, num_classes=64).eval()
    return step(
        timm.create_model("vit_tiny_patch16_224", img_size=96, num_classes=64),
        target=512,
        sample=images(2, 96),
        loss=_Distiller(teacher).loss,
    )


@workload("torchvision")
def frozen_backbone() -> Step:
    """A linear probe: the backbone is frozen and in eval mode for its statistics."""
    from torchvision.models import resnet50

    model = resnet50()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("fc"))
    head = torch.optim.SGD(model.fc.parameters(), lr=0.1, momentum=0.9)
    return step(
        model,
        target=1024,
        sample=(images(2, 64), torch.randint(1000, (2,))),
        loss=lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]),
        optimizer=head,
    )
