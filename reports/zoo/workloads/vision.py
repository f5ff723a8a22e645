"""Classification, segmentation, restoration and contrastive vision."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autobatch.workload.sample import batch_builder
from autobatch.workload.workload import Workload
from reports.zoo.entries import Step, step, workload
from reports.zoo.workloads.parts import images


def _labelled(size: int, classes: int, samples: int = 2) -> tuple[Tensor, Tensor]:
    return images(samples, size), torch.randint(classes, (samples,))


def _masks(size: int, classes: int) -> tuple[Tensor, Tensor]:
    return images(2, size), torch.randint(classes, (2, size, size))


@workload("timm")
def timm_convnext() -> Step:
    """ConvNeXt of timm with its cosine schedule's optimizer groups and label smoothing."""
    import timm
    from timm.loss import LabelSmoothingCrossEntropy
    from timm.optim import create_optimizer_v2

    model = timm.create_model("convnext_atto", num_classes=100)
    criterion = LabelSmoothingCrossEntropy(0.1)
    return step(
        model,
        target=1024,
        sample=_labelled(64, 100),
        loss=lambda model, batch: criterion(model(batch[0]), batch[1]),
        optimizer=create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05),
    )


@workload("torchvision", "timm")
def mixup() -> Step:
    """MixUp and CutMix of torchvision, on the card, before a soft cross entropy of timm."""
    import timm
    from timm.loss import SoftTargetCrossEntropy
    from torchvision.transforms import v2

    mix = v2.RandomChoice([v2.MixUp(num_classes=100), v2.CutMix(num_classes=100)])
    criterion = SoftTargetCrossEntropy()

    def loss(model: nn.Module, batch: Any) -> Tensor:
        x, soft = mix(*batch)
        return criterion(model(x), soft)  # type: ignore[no-any-return]

    model = timm.create_model("resnet18", num_classes=100)
    return step(model, target=1024, sample=_labelled(64, 100), loss=loss, optimizer="sgd")


@workload("timm")
def timm_lamb() -> Step:
    """A ViT of timm with the layer-wise optimizer Lamb and averaged weights."""
    import timm
    from timm.optim import Lamb

    model = timm.create_model("vit_tiny_patch16_224", img_size=96, num_classes=100)
    average = torch.optim.swa_utils.AveragedModel(model)

    def window(model: nn.Module, optimizer: Any, batches: Any) -> None:
        for x, labels in batches:
            F.cross_entropy(model(x), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(model)

    made = Workload(
        model=model,
        batch=batch_builder(_labelled(96, 100)),
        window=window,
        optimizer=Lamb(model.parameters(), lr=5e-3),
    )
    return step(made, target=1024)


@workload("torchvision")
def resnet_criterion() -> Step:
    """ResNet-50 of torchvision with `nn.CrossEntropyLoss()` itself as the loss, channels last."""
    from torchvision.models import resnet50

    model = resnet50(num_classes=100).to(memory_format=torch.channels_last)
    return step(
        model,
        target=512,
        gpu="t4",
        sample=(images(2, 64).to(memory_format=torch.channels_last), torch.randint(100, (2,))),
        loss=nn.CrossEntropyLoss(label_smoothing=0.1),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        autocast="fp16",
    )


@workload("vit-pytorch")
def vit_pytorch() -> Step:
    """A ViT of vit-pytorch with the usual labels."""
    from vit_pytorch import ViT

    model = ViT(
        image_size=96, patch_size=16, num_classes=100, dim=256, depth=4, heads=4, mlp_dim=512
    )
    return step(model, target=512, sample=_labelled(96, 100), loss=nn.CrossEntropyLoss())


@workload("vit-pytorch")
def vit_dino() -> Step:
    """DINO of vit-pytorch, whose forward pass is the loss and which keeps a teacher."""
    from vit_pytorch import Dino, ViT

    vit = ViT(image_size=64, patch_size=16, num_classes=100, dim=128, depth=3, heads=4, mlp_dim=256)
    learner = Dino(
        vit, image_size=64, hidden_layer="to_latent", projection_hidden_size=128,
        projection_layers=2, num_classes_K=1024,
    )  # fmt: skip
    return step(learner, target=512, sample=images(2, 64))


@workload("efficientnet-pytorch")
def efficientnet() -> Step:
    """EfficientNet of its own package, with swish as a custom autograd function."""
    from efficientnet_pytorch import EfficientNet

    model = EfficientNet.from_name("efficientnet-b0", num_classes=100, drop_connect_rate=0.0)
    return step(
        model,
        target=512,
        sample=_labelled(64, 100),
        loss=nn.CrossEntropyLoss(),
        optimizer=torch.optim.RMSprop(model.parameters(), momentum=0.9),
    )


@workload("segmentation-models-pytorch")
def unet_dice() -> Step:
    """A Unet of segmentation-models-pytorch with its Dice loss, on a T4."""
    import segmentation_models_pytorch as smp

    model = smp.Unet("resnet18", encoder_weights=None, classes=1)
    dice = smp.losses.DiceLoss(smp.losses.BINARY_MODE)
    sample = (images(2, 64), torch.randint(2, (2, 1, 64, 64)).float())
    return step(
        model,
        target=64,
        gpu="t4",
        sample=sample,
        loss=lambda model, batch: dice(model(batch[0]), batch[1]),
    )


@workload("segmentation-models-pytorch")
def deeplab_focal() -> Step:
    """DeepLabV3+ with a focal loss over classes, some of which are ignored."""
    import segmentation_models_pytorch as smp

    model = smp.DeepLabV3Plus("resnet18", encoder_weights=None, classes=8)
    focal = smp.losses.FocalLoss(smp.losses.MULTICLASS_MODE, ignore_index=255)
    return step(
        model,
        target=128,
        sample=_masks(128, 8),
        loss=lambda model, batch: focal(model(batch[0]), batch[1]),
    )


@workload("segmentation-models-pytorch")
def fpn_lovasz() -> Step:
    """FPN with the Lovász loss, which leaves out classes that no pixel has."""
    import segmentation_models_pytorch as smp

    model = smp.FPN("resnet18", encoder_weights=None, classes=8, decoder_dropout=0.0)
    lovasz = smp.losses.LovaszLoss(smp.losses.MULTICLASS_MODE)
    return step(
        model,
        target=256,
        sample=_masks(64, 8),
        loss=lambda model, batch: lovasz(model(batch[0]), batch[1]),
    )


@workload("monai")
def monai_unet() -> Step:
    """The 3D UNet of MONAI with its Dice and cross entropy."""
    from monai.losses import DiceCELoss
    from monai.networks.nets import UNet

    model = UNet(
        spatial_dims=3, in_channels=1, out_channels=3, channels=(16, 32, 64), strides=(2, 2)
    )
    loss = DiceCELoss(to_onehot_y=True, softmax=True)
    sample = (torch.randn(2, 1, 48, 48, 48), torch.randint(3, (2, 1, 48, 48, 48)))
    return step(
        model, target=64, sample=sample, loss=lambda model, batch: loss(model(batch[0]), batch[1])
    )


@workload("monai")
def monai_segresnet() -> Step:
    """SegResNet of MONAI with the generalized Dice loss."""
    from monai.losses import GeneralizedDiceLoss
    from monai.networks.nets import SegResNet

    model = SegResNet(spatial_dims=3, init_filters=8, in_channels=4, out_channels=3)
    loss = GeneralizedDiceLoss(sigmoid=True)
    sample = (torch.randn(2, 4, 48, 48, 48), torch.randint(2, (2, 3, 48, 48, 48)).float())
    return step(
        model, target=32, sample=sample, loss=lambda model, batch: loss(model(batch[0]), batch[1])
    )


@workload("monai", "einops")
def monai_swin() -> Step:
    """SwinUNETR of MONAI with gradient checkpointing."""
    from monai.losses import DiceLoss
    from monai.networks.nets import SwinUNETR

    model = SwinUNETR(in_channels=1, out_channels=2, feature_size=12, use_checkpoint=True)
    loss = DiceLoss(to_onehot_y=True, softmax=True)
    sample = (torch.randn(2, 1, 64, 64, 64), torch.randint(2, (2, 1, 64, 64, 64)))
    return step(
        model,
        target=16,
        sample=sample,
        loss=lambda model, batch: loss(model(batch[0]), batch[1]),
        on_cpu=(1, 2),
    )


@workload("kornia", "torchvision")
def kornia_augmented() -> Step:
    """Kornia augments on the card before a ResNet."""
    import kornia.augmentation as K
    from torchvision.models import resnet18

    augment = nn.Sequential(
        K.RandomHorizontalFlip(p=0.5),
        K.ColorJiggle(0.1, 0.1, 0.1, 0.1, p=1.0),
        K.Normalize(mean=torch.tensor([0.5] * 3), std=torch.tensor([0.2] * 3)),
    )

    def loss(model: nn.Module, batch: Any) -> Tensor:
        with torch.no_grad():
            x = augment(batch[0])
        return F.cross_entropy(model(x), batch[1])

    return step(resnet18(num_classes=10), target=512, sample=_labelled(64, 10), loss=loss)


@workload("kornia", "torchvision")
def kornia_crops() -> Step:
    """Kornia's random crops, whose sizes are checked values."""
    import kornia.augmentation as K
    from torchvision.models import resnet18

    crop = K.RandomResizedCrop((64, 64), scale=(0.5, 1.0), cropping_mode="resample")

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(crop(batch[0])), batch[1])

    return step(resnet18(num_classes=10), target=512, sample=_labelled(80, 10), loss=loss)


@workload("lightly", "torchvision")
def simclr() -> Step:
    """SimCLR of lightly: two views, NTXent over the batch."""
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead
    from torchvision.models import resnet18

    backbone = resnet18()
    backbone.fc = nn.Identity()
    model = nn.Sequential(backbone, SimCLRProjectionHead(512, 512, 128))
    criterion = NTXentLoss()
    return step(
        model,
        target=512,
        sample=(images(4, 64), images(4, 64)),
        loss=lambda model, views: criterion(model(views[0]), model(views[1])),
        on_cpu=(4, 6, 8),
    )


@workload("lightly", "torchvision")
def byol() -> Step:
    """BYOL of lightly: momentum copies inside the module, updated in the loss."""
    import copy

    from lightly.loss import NegativeCosineSimilarity
    from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead
    from lightly.models.utils import deactivate_requires_grad, update_momentum
    from torchvision.models import resnet18

    class Byol(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            backbone = resnet18()
            backbone.fc = nn.Identity()
            self.backbone = backbone
            self.projection = BYOLProjectionHead(512, 512, 128)
            self.prediction = BYOLPredictionHead(128, 512, 128)
            self.slow = copy.deepcopy(self.backbone)
            self.slow_projection = copy.deepcopy(self.projection)
            deactivate_requires_grad(self.slow)
            deactivate_requires_grad(self.slow_projection)

        def forward(self, x: Tensor) -> Tensor:
            return self.prediction(self.projection(self.backbone(x)))  # type: ignore[no-any-return]

        def targets(self, x: Tensor) -> Tensor:
            return self.slow_projection(self.slow(x)).detach()  # type: ignore[no-any-return]

    criterion = NegativeCosineSimilarity()

    def loss(model: Any, views: Any) -> Tensor:
        update_momentum(model.backbone, model.slow, m=0.99)
        update_momentum(model.projection, model.slow_projection, m=0.99)
        a, b = views
        pairs = criterion(model(a), model.targets(b)), criterion(model(b), model.targets(a))
        return 0.5 * (pairs[0] + pairs[1])  # type: ignore[no-any-return]

    sample = (images(2, 64), images(2, 64))
    return step(Byol(), target=512, sample=sample, loss=loss)


@workload("pytorch-metric-learning", "torchvision")
def triplets() -> Step:
    """Triplets of pytorch-metric-learning with its miner of hard ones."""
    from pytorch_metric_learning import losses, miners
    from torchvision.models import resnet18

    miner, criterion = miners.BatchHardMiner(), losses.TripletMarginLoss()

    def loss(model: nn.Module, batch: Any) -> Tensor:
        embeddings = model(batch[0])
        return criterion(embeddings, batch[1], miner(embeddings, batch[1]))  # type: ignore[no-any-return]

    sample = (images(8, 64), torch.arange(8) % 4)
    return step(resnet18(num_classes=64), target=256, sample=sample, loss=loss, on_cpu=(8, 10, 12))


@workload("pytorch-metric-learning", "torchvision")
def arcface() -> Step:
    """ArcFace of pytorch-metric-learning, whose weights are trained with the model's."""
    from pytorch_metric_learning import losses
    from torchvision.models import resnet18

    model = resnet18(num_classes=64)
    criterion = losses.ArcFaceLoss(num_classes=100, embedding_size=64)
    both = [*model.parameters(), *criterion.parameters()]
    sample = (images(4, 64), torch.randint(100, (4,)))
    return step(
        model,
        target=256,
        sample=sample,
        loss=lambda model, batch: criterion(model(batch[0]), batch[1]),
        optimizer=torch.optim.AdamW(both),
        learned=list(criterion.parameters()),
    )


@workload("pytorch-metric-learning", "torchvision")
def supervised_contrast() -> Step:
    """Supervised contrast of pytorch-metric-learning."""
    from pytorch_metric_learning.losses import SupConLoss
    from torchvision.models import resnet18

    criterion = SupConLoss()
    sample = (images(8, 64), torch.arange(8) % 4)
    return step(
        resnet18(num_classes=64),
        target=256,
        sample=sample,
        loss=lambda model, batch: criterion(F.normalize(model(batch[0])), batch[1]),
        on_cpu=(8, 10, 12),
    )


@workload("lpips")
def perceptual() -> Step:
    """Superresolution against a frozen LPIPS network that the loss closes over."""
    import lpips

    distance = lpips.LPIPS(net="alex", pretrained=False, pnet_rand=True, verbose=False)
    distance.requires_grad_(False)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 12, 3, padding=1),
        nn.PixelShuffle(2),
    )

    def loss(model: nn.Module, batch: Any) -> Tensor:
        fine = model(batch[0])
        return F.l1_loss(fine, batch[1]) + distance(fine, batch[1], normalize=True).mean()

    return step(model, target=256, sample=(images(2, 32), images(2, 64)), loss=loss)


@workload("pytorch-msssim")
def similarity() -> Step:
    """An autoencoder with the structural similarity of pytorch-msssim."""
    from pytorch_msssim import SSIM

    similar = SSIM(data_range=1.0, size_average=True, channel=3)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, 2, 1),
        nn.SiLU(),
        nn.ConvTranspose2d(32, 3, 4, 2, 1),
        nn.Sigmoid(),
    )
    return step(
        model,
        target=512,
        sample=images(2, 64),
        loss=lambda model, x: 1 - similar(model(x), x),
    )


@workload("compressai")
def compression() -> Step:
    """CompressAI's scale hyperprior with its rate and distortion."""
    import math

    from compressai.models import ScaleHyperprior

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        out = model(x)
        pixels = x.size(0) * x.size(2) * x.size(3)
        rate = sum(v.log().sum() / (-math.log(2) * pixels) for v in out["likelihoods"].values())
        return rate + 0.01 * 255**2 * F.mse_loss(out["x_hat"], x)  # type: ignore[no-any-return]

    return step(ScaleHyperprior(32, 48), target=128, sample=images(2, 64), loss=loss)


@workload("torchmetrics", "torchvision")
def with_metrics() -> Step:
    """A loop that updates torchmetrics on the card as it goes."""
    import torchmetrics
    from torchvision.models import resnet18

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = resnet18(num_classes=10)
            self.accuracy = torchmetrics.Accuracy(task="multiclass", num_classes=10)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)  # type: ignore[no-any-return]

    def loss(model: Any, batch: Any) -> Tensor:
        logits = model(batch[0])
        model.accuracy.update(logits, batch[1])
        return F.cross_entropy(logits, batch[1])

    return step(Net(), target=512, sample=_labelled(64, 10), loss=loss)


@workload("lightning", "torchmetrics", "torchvision")
def lightning_module() -> Step:
    """A LightningModule with `self.device` and a metric, by its callback."""
    import lightning as L
    import torchmetrics
    from torchvision.models import resnet18

    from autobatch.integrations.lightning import AutobatchCallback
    from reports.zoo.entries import GPU

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = resnet18(num_classes=10)
            self.accuracy = torchmetrics.Accuracy(task="multiclass", num_classes=10)
            self.batch_size = 2

        def training_step(self, batch: Any, index: int) -> Tensor:
            x, labels = batch
            logits = self.net(x + 0.1 * torch.randn(x.shape, device=self.device))
            self.log("accuracy", self.accuracy(logits, labels))
            return F.cross_entropy(logits, labels)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters())

        def train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(data, batch_size=self.batch_size)

    data = torch.utils.data.TensorDataset(*_labelled(64, 10, samples=64))
    module = Module()
    callback = AutobatchCallback(target=32, gpu=GPU)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}

    def plan() -> Any:
        trainer = L.Trainer(max_steps=1, accelerator="cpu", callbacks=[callback], **quiet)
        trainer.strategy.connect(module)
        module.trainer = trainer
        callback.setup(trainer, module, "fit")
        return callback.plan

    return Step(plan=plan, model=module, on_cpu="Lightning's trainer runs the step", state=2.0)
