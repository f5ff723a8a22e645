"""Detection: batches that are lists, boxes in flat rows, matching."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from reports.zoo.entries import Step, step, workload
from reports.zoo.workloads.parts import images


def _targets(samples: int, size: int, *, masks: bool = False) -> list[dict[str, Tensor]]:
    corner = torch.rand(samples, 3, 2) * size / 2
    boxes = torch.cat([corner, corner + 8 + torch.rand(samples, 3, 2) * size / 3], dim=-1)
    made: list[dict[str, Tensor]] = []
    for each in boxes:
        target = {"boxes": each, "labels": torch.randint(1, 5, (3,))}
        if masks:
            target["masks"] = torch.randint(2, (3, size, size), dtype=torch.uint8)
        made.append(target)
    return made


def _torchvision(
    name: str,
    *,
    size: int = 128,
    masks: bool = False,
    **options: Any,
) -> Step:
    from torchvision.models import detection

    model = getattr(detection, name)(weights=None, weights_backbone=None, num_classes=5, **options)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        pictures, targets = batch
        return sum(model(pictures, targets).values())  # type: ignore[return-value]

    sample = (list(images(2, size)), _targets(2, size, masks=masks))
    return step(
        model, target=32, sample=sample, loss=loss, optimizer="sgd", state=0.0, bounded=True
    )


@workload("torchvision")
def faster_rcnn() -> Step:
    """Faster R-CNN of torchvision on lists of images and targets."""
    return _torchvision("fasterrcnn_mobilenet_v3_large_fpn", min_size=128, max_size=160)


@workload("torchvision")
def mask_rcnn() -> Step:
    """Mask R-CNN of torchvision, with masks beside the boxes."""
    return _torchvision("maskrcnn_resnet50_fpn", masks=True, min_size=128, max_size=160)


@workload("torchvision")
def retinanet() -> Step:
    """RetinaNet of torchvision."""
    return _torchvision("retinanet_resnet50_fpn", min_size=128, max_size=160)


@workload("torchvision")
def ssd() -> Step:
    """SSDlite of torchvision, which mines hard negatives."""
    return _torchvision("ssdlite320_mobilenet_v3_large", size=320)


@workload("torchvision")
def fcos() -> Step:
    """FCOS of torchvision, which has no anchors."""
    return _torchvision("fcos_resnet50_fpn", min_size=128, max_size=160)


@workload("ultralytics")
def yolo() -> Step:
    """YOLO of Ultralytics: boxes in flat rows with the index of their image."""
    from types import SimpleNamespace

    from ultralytics.nn.tasks import DetectionModel

    model = DetectionModel("yolov8n.yaml", ch=3, nc=5, verbose=False)
    model.args = SimpleNamespace(box=7.5, cls=0.5, dfl=1.5)
    sample = {
        "img": images(2, 128),
        "batch_idx": torch.tensor([0.0, 0, 0, 1, 1, 1]),
        "cls": torch.randint(5, (6, 1)).float(),
        "bboxes": torch.rand(6, 4) * 0.3 + 0.3,
    }
    return step(
        model,
        target=64,
        sample=sample,
        loss=lambda model, batch: model.loss(batch)[0].sum(),
        state=2.0,
        bounded=True,
    )


@workload("transformers", "scipy", "timm")
def detr() -> Step:
    """DETR of transformers, which matches boxes on the CPU with SciPy."""
    from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

    backbone = ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32, 64, 64], depths=[1, 1, 1, 1],
        layer_type="basic", out_features=["stage4"],
    )  # fmt: skip
    config = DetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None,
        backbone_config=backbone, num_queries=20, d_model=64, encoder_layers=2, decoder_layers=2,
        encoder_ffn_dim=128, decoder_ffn_dim=128, encoder_attention_heads=4,
        decoder_attention_heads=4, num_labels=5, dropout=0.0, attention_dropout=0.0,
        activation_dropout=0.0, attn_implementation="eager",
    )  # fmt: skip
    labels = [
        {"class_labels": torch.randint(5, (3,)), "boxes": torch.rand(3, 4) * 0.3 + 0.3}
        for _ in range(2)
    ]
    sample = {"pixel_values": images(2, 128), "labels": labels}
    return step(DetrForObjectDetection(config), target=64, sample=sample, on_cpu=(4, 6, 8))
