"""Models of torchvision, timm and transformers, built from their configs with random weights.

Most are smaller than the published ones, in width and number of layers: what mixes samples does not
depend on that. ResNet-18 and GPT-2 small are whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reports.equivalence.cases import Case, Loss

N = 8
TOKENS = 12
VOCABULARY = 60
WIDTHS = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
SMALL = {**WIDTHS, "vocab_size": VOCABULARY}


def _classified(model: nn.Module, batch: Any) -> Tensor:
    out = model(batch[0])
    return F.cross_entropy(getattr(out, "logits", out), batch[1])


def _own(model: nn.Module, batch: Any) -> Tensor:
    loss: Tensor = model(**batch).loss
    return loss


def _images(size: int) -> Callable[[], tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return lambda: (torch.randn(N, 3, size, size, generator=generator), torch.arange(N))


def _timm(name: str, size: int, **options: Any) -> Callable[[], tuple[nn.Module, Any, Loss]]:
    def build() -> tuple[nn.Module, Any, Loss]:
        import timm

        torch.manual_seed(1)
        return timm.create_model(name, num_classes=10, **options), _images(size)(), _classified

    return build


def _torchvision(name: str, size: int, **options: Any) -> Callable[[], tuple[nn.Module, Any, Loss]]:
    def build() -> tuple[nn.Module, Any, Loss]:
        import torchvision

        torch.manual_seed(1)
        options.setdefault("num_classes", 10)
        model: nn.Module = getattr(torchvision.models, name)(**options)
        return model, _images(size)(), _classified

    return build


def _group_norm(channels: int) -> nn.Module:
    return nn.GroupNorm(8, channels)


def tokens(*, tail: int = 0) -> dict[str, Tensor]:
    """Return token ids with labels, of which the last ones of two samples are ignored."""
    ids = torch.randint(4, VOCABULARY, (N, TOKENS), generator=torch.Generator().manual_seed(6))
    labels = ids.clone()
    labels[:2, TOKENS - tail :] = -100
    return {"input_ids": ids, "labels": labels}


def _transformers(
    config: str, model: str, batch: Callable[[], Any], loss: Loss = _own, **options: Any
) -> Callable[[], tuple[nn.Module, Any, Loss]]:
    def build() -> tuple[nn.Module, Any, Loss]:
        import transformers

        torch.manual_seed(1)
        made = getattr(transformers, model)(getattr(transformers, config)(**options))
        return made, batch(), loss

    return build


def _language(name: str, config: str, model: str, **options: Any) -> Case:
    return Case(
        name=f"transformers: {name}",
        is_equivalent=False,
        why="divided by the labels that are not ignored",
        build=_transformers(config, model, tokens, **options),
        unequal=lambda: tokens(tail=6),
    )


def _gpt2_small() -> tuple[nn.Module, Any, Loss]:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(1)
    ids = torch.randint(0, 50257, (N, 128), generator=torch.Generator().manual_seed(6))
    return GPT2LMHeadModel(GPT2Config()), {"input_ids": ids, "labels": ids}, _own


def _sequences() -> dict[str, Tensor]:
    return {"input_ids": tokens()["input_ids"], "labels": torch.arange(N) % 2}


def _speech() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {
        "input_values": torch.randn(N, 4000, generator=generator),
        "labels": torch.randint(4, 30, (N, 3), generator=generator),
    }


def _pairs() -> dict[str, Any]:
    pixels = torch.randn(N, 3, 32, 32, generator=torch.Generator().manual_seed(8))
    return {"input_ids": tokens()["input_ids"], "pixel_values": pixels, "return_loss": True}


def _pixels(size: int, key: str | None = "labels") -> Callable[[], dict[str, Tensor]]:
    def build() -> dict[str, Tensor]:
        images, labels = _images(size)()
        return {"pixel_values": images} | ({key: labels % 2} if key else {})

    return build


def _clip() -> tuple[nn.Module, Any, Loss]:
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(1)
    text = {**SMALL, "max_position_embeddings": TOKENS, "eos_token_id": 3, "bos_token_id": 2}
    vision = {**SMALL, "image_size": 32, "patch_size": 16}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    return CLIPModel(config), _pairs(), _own


def _retinanet() -> tuple[nn.Module, Any, Loss]:
    from torchvision.models import resnet18
    from torchvision.models.detection import RetinaNet
    from torchvision.models.detection.anchor_utils import AnchorGenerator

    torch.manual_seed(1)
    body = nn.Sequential(*list(resnet18(norm_layer=_group_norm).children())[:-2])
    body.out_channels = 512
    anchors = AnchorGenerator(((32, 64),), ((0.5, 1.0, 2.0),))
    model = RetinaNet(body, 3, anchor_generator=anchors, min_size=64, max_size=64)
    images = [torch.rand(3, 64, 64) for _ in range(N)]
    targets = [
        {
            "boxes": torch.tensor([[5.0, 5.0, 40.0, 40.0], [20.0, 10.0, 60.0, 50.0]][: i % 2 + 1]),
            "labels": torch.tensor([1, 2][: i % 2 + 1]),
        }
        for i in range(N)
    ]
    return model, (images, targets), lambda m, b: torch.stack([*m(*b).values()]).sum()


def _named(name: str, is_equivalent: bool, why: str, build: Any, unequal: Any = None) -> Case:
    return Case(name=name, is_equivalent=is_equivalent, why=why, build=build, unequal=unequal)


_STATISTICS = "statistics of the batch"
_BY_SAMPLE = "by sample"
_OF_VIT = {"embed_dim": 48, "num_heads": 3, "depth": 2}

MODELS = (
    _named("torchvision: resnet18 at 224", False, _STATISTICS, _torchvision("resnet18", 224)),
    _named("torchvision: resnet18 with GroupNorm", True, _BY_SAMPLE,
           _torchvision("resnet18", 64, norm_layer=_group_norm)),
    _named("torchvision: squeezenet1_1", True, "draws alone", _torchvision("squeezenet1_1", 64)),
    _named("torchvision: mobilenet_v3_small", False, _STATISTICS,
           _torchvision("mobilenet_v3_small", 64)),
    _named("torchvision: shufflenet_v2", False, _STATISTICS,
           _torchvision("shufflenet_v2_x0_5", 64)),
    _named("torchvision: retinanet", True, "divided in each image", _retinanet),
    _named("timm: vit_tiny", True, _BY_SAMPLE,
           _timm("vit_tiny_patch16_224", 64, img_size=64, **_OF_VIT)),
    _named("timm: deit_tiny with drop path", True, "draws alone",
           _timm("deit_tiny_patch16_224", 64, img_size=64, drop_path_rate=0.3, **_OF_VIT)),
    _named("timm: convnext_atto", True, _BY_SAMPLE, _timm("convnext_atto", 64)),
    _named("timm: mixer_s16", True, _BY_SAMPLE,
           _timm("mixer_s16_224", 64, img_size=64)),
    _named("timm: efficientnet_lite0", False, _STATISTICS, _timm("efficientnet_lite0", 64)),
    _named("timm: regnetx_002", False, _STATISTICS, _timm("regnetx_002", 64)),
    _named("timm: ghostnet_050", False, _STATISTICS, _timm("ghostnet_050", 64)),
    _named("timm: levit_128s", False, _STATISTICS, _timm("levit_128s", 224)),
    _language("gpt2", "GPT2Config", "GPT2LMHeadModel", n_embd=32, n_layer=2, n_head=4,
              vocab_size=VOCABULARY),
    Case(name="transformers: gpt2 small, 128 tokens", is_equivalent=False,
         why="divided by the labels that are not ignored", build=_gpt2_small),
    _language("llama", "LlamaConfig", "LlamaForCausalLM", **SMALL),
    _language("qwen2", "Qwen2Config", "Qwen2ForCausalLM", num_key_value_heads=2, **SMALL),
    _language("bert, masked tokens", "BertConfig", "BertForMaskedLM", **SMALL),
    _language("albert, masked tokens", "AlbertConfig", "AlbertForMaskedLM", embedding_size=16,
              **SMALL),
    _language("opt with layer drop", "OPTConfig", "OPTForCausalLM", hidden_size=32, ffn_dim=48,
              num_hidden_layers=4, num_attention_heads=4, vocab_size=VOCABULARY, layerdrop=0.3,
              word_embed_proj_dim=32),
    _language("t5", "T5Config", "T5ForConditionalGeneration", d_model=32, d_ff=48, num_layers=2,
              num_heads=4, d_kv=8, vocab_size=VOCABULARY, decoder_start_token_id=0),
    _language("mixtral with its auxiliary loss", "MixtralConfig", "MixtralForCausalLM",
              num_key_value_heads=2, num_local_experts=4, output_router_logits=True, **SMALL),
    _named("transformers: distilbert, classes", True, "draws alone",
           _transformers("DistilBertConfig", "DistilBertForSequenceClassification", _sequences,
                         dim=32, n_layers=2, n_heads=4, hidden_dim=48, vocab_size=VOCABULARY)),
    _named("transformers: roberta, classes", True, "draws alone",
           _transformers("RobertaConfig", "RobertaForSequenceClassification", _sequences, **SMALL)),
    _named("transformers: vit, classes", True, _BY_SAMPLE,
           _transformers("ViTConfig", "ViTForImageClassification", _pixels(32), image_size=32,
                         **WIDTHS)),
    _named("transformers: vit_mae", True, "hides as many patches of each image",
           _transformers("ViTMAEConfig", "ViTMAEForPreTraining", _pixels(32, None), image_size=32,
                         decoder_hidden_size=32, decoder_num_hidden_layers=1,
                         decoder_num_attention_heads=4, decoder_intermediate_size=48,
                         patch_size=8,
                         **WIDTHS)),
    _named("transformers: clip", False, "samples interact", _clip),
    _named("transformers: wav2vec2 with SpecAugment", True, "draws alone, of NumPy",
           _transformers("Wav2Vec2Config", "Wav2Vec2ForCTC", _speech, conv_dim=(16, 16),
                         conv_stride=(5, 4), conv_kernel=(10, 8), num_feat_extract_layers=2,
                         mask_time_prob=0.3, mask_time_length=2, num_conv_pos_embeddings=4,
                         num_conv_pos_embedding_groups=2, feat_extract_norm="layer", layerdrop=0.0,
                         ctc_loss_reduction="mean",
                         **{**SMALL, "vocab_size": 32})),
)  # fmt: skip
