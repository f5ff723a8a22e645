"""Text and image pairs, retrieval, preference."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reports.zoo.entries import GPU, Step, step, workload
from reports.zoo.workloads.parts import images, llama, sentence, tokenizer, tokens


def _encoder() -> Any:
    from sentence_transformers import SentenceTransformer, models
    from transformers import BertConfig, BertModel

    bert = BertModel(
        BertConfig(
            num_hidden_layers=3, hidden_size=128, num_attention_heads=4, intermediate_size=512,
            vocab_size=1024, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
            attn_implementation="eager",
        )
    )  # fmt: skip

    class Words(nn.Module):
        """A BERT from its config, as the first module of a sentence transformer."""

        def __init__(self) -> None:
            super().__init__()
            self.auto_model = bert

        def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
            out = self.auto_model(
                input_ids=features["input_ids"], attention_mask=features["attention_mask"]
            )
            features["token_embeddings"] = out.last_hidden_state
            return features

    return SentenceTransformer(modules=[Words(), models.Pooling(128)], device="cpu")


def _features(count: int, samples: int = 4) -> list[dict[str, Tensor]]:
    made = [tokens(samples, 64, 1024) for _ in range(count)]
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in made]


@workload("sentence-transformers", "transformers")
def ranking() -> Step:
    """Multiple negatives ranking of sentence-transformers on lists of features."""
    from sentence_transformers.losses import MultipleNegativesRankingLoss

    model = _encoder()
    criterion = MultipleNegativesRankingLoss(model)
    return step(
        model,
        target=512,
        sample=_features(2),
        loss=lambda model, features: criterion(features, None),
        on_cpu=(4, 6, 8),
    )


@workload("sentence-transformers", "transformers")
def cosines() -> Step:
    """CoSENT of sentence-transformers, with a score for each pair."""
    from sentence_transformers.losses import CoSENTLoss

    model = _encoder()
    criterion = CoSENTLoss(model)
    return step(
        model,
        target=256,
        sample=(_features(2), torch.rand(4)),
        loss=lambda model, batch: criterion(batch[0], batch[1]),
        on_cpu=(4, 6, 8),
    )


@workload("open_clip_torch")
def open_clip() -> Step:
    """A CLIP of open_clip with its own loss, quadratic in the batch."""
    from open_clip.loss import ClipLoss
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    model = CLIP(
        embed_dim=128,
        vision_cfg=CLIPVisionCfg(layers=3, width=128, head_width=32, patch_size=16, image_size=64),
        text_cfg=CLIPTextCfg(context_length=32, vocab_size=1024, width=128, heads=4, layers=3),
    )
    criterion = ClipLoss()

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return criterion(*model(*batch)[:3])  # type: ignore[no-any-return]

    sample = (images(4, 64), torch.randint(1024, (4, 32)))
    return step(
        model,
        target=4096,
        sample=sample,
        loss=loss,
        on_cpu="the CPU's attention kernel keeps other bytes than the GPU's",
        state=2.0,
    )


@workload("transformers")
def siglip() -> Step:
    """SigLIP of transformers, with the loss of its own."""
    from transformers import SiglipConfig, SiglipModel, SiglipTextConfig, SiglipVisionConfig

    sizes = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    config = SiglipConfig(
        text_config=SiglipTextConfig(vocab_size=1024, max_position_embeddings=32, **sizes),
        vision_config=SiglipVisionConfig(image_size=64, patch_size=16, **sizes),
    )
    config._attn_implementation = "eager"
    sample = {"input_ids": tokens(4, 32, 1024), "pixel_values": images(4, 64), "return_loss": True}
    return step(
        SiglipModel(config),
        target=2048,
        sample=sample,
        on_cpu="the logarithm of a sigmoid keeps a table on the CPU that a GPU does not need",
        state=2.0,
    )


@workload("info-nce-pytorch", "torchvision")
def info_nce() -> Step:
    """InfoNCE of its own package over embeddings of two views."""
    from info_nce import InfoNCE
    from torchvision.models import resnet18

    criterion = InfoNCE()
    return step(
        resnet18(num_classes=64),
        target=512,
        sample=(images(4, 64), images(4, 64)),
        loss=lambda model, views: criterion(model(views[0]), model(views[1])),
        on_cpu=(4, 6, 8),
    )


@workload("transformers")
def preference_by_hand() -> Step:
    """DPO by hand: a frozen reference in a closure, chosen and rejected answers."""
    reference = llama().eval().requires_grad_(False)

    def score(model: nn.Module, ids: Tensor) -> Tensor:
        logits = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
        return logits.gather(-1, ids[:, 1:, None]).squeeze(-1).sum(-1)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        chosen, rejected = batch
        with torch.no_grad():
            base = score(reference, chosen) - score(reference, rejected)
        return -F.logsigmoid(0.1 * (score(model, chosen) - score(model, rejected) - base)).mean()

    return step(llama(), target=128, sample=(tokens(2, 96), tokens(2, 96)), loss=loss)


def _trl(
    make: Any, rows: list[dict[str, Any]], name: str, reference: Any = None, **options: Any
) -> Step:
    import trl
    from datasets import Dataset

    from autobatch.integrations.transformers import tune_trainer

    model = make()
    config = getattr(trl, f"{name}Config")(
        output_dir="/tmp/zoo", report_to="none", use_cpu=True, bf16=False, **options
    )
    trainer = getattr(trl, f"{name}Trainer")(
        model=model,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
        **({} if reference is None else {"ref_model": reference}),
    )
    return Step(
        plan=lambda: tune_trainer(trainer, target=32, gpu=GPU),
        model=trainer.model,
        on_cpu="the trainer makes its own optimizer and loss while it is tuned",
        state=2.0,
    )


@workload("trl", "transformers", "datasets")
def trl_sft() -> Step:
    """SFTTrainer of TRL on texts."""
    rows = [{"text": sentence(60)} for _ in range(32)]
    return _trl(lambda: llama(vocab_size=256), rows, "SFT", max_length=64)


@workload("trl", "transformers", "datasets")
def trl_dpo() -> Step:
    """DPOTrainer of TRL with a reference model of its own."""
    rows = [{"prompt": "w1 w2", "chosen": sentence(40), "rejected": sentence(30)}] * 32
    reference = llama(vocab_size=256)
    return _trl(lambda: llama(vocab_size=256), rows, "DPO", reference, max_length=64)


@workload("trl", "transformers", "datasets")
def trl_reward() -> Step:
    """RewardTrainer of TRL on pairs of answers."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    def make() -> Any:
        config = LlamaConfig(
            num_hidden_layers=2, hidden_size=128, intermediate_size=256, num_attention_heads=4,
            vocab_size=256, num_labels=1, pad_token_id=0,
        )  # fmt: skip
        return LlamaForSequenceClassification(config)

    rows = [{"chosen": sentence(40), "rejected": sentence(30)}] * 32
    return _trl(make, rows, "Reward", max_length=64)
