"""Losses of many fields on one small network, and what a network may do besides."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reports.equivalence.cases import SAMPLES, Case, Loss, classes, inputs, network, targets

X, Y, C = inputs(), targets(), classes()
NAMED = {"x": X, "y": Y}


def _case(
    name: str,
    is_equivalent: bool,
    why: str,
    loss: Loss,
    batch: Any = None,
    unequal: Any = None,
    model: Callable[[], nn.Module] = network,
) -> Case:
    given = (X, Y) if batch is None else batch
    other = None if unequal is None else lambda: unequal
    return Case(
        name=f"loss: {name}",
        is_equivalent=is_equivalent,
        why=why,
        build=lambda: (model(), given, loss),
        unequal=other,
    )


def _of_outputs(function: Callable[[Tensor, Tensor], Tensor]) -> Loss:
    return lambda model, batch: function(model(batch[0]), batch[1])


def _normal(tensor: Tensor) -> Tensor:
    return F.normalize(tensor, dim=-1)


def _contrastive(out: Tensor, other: Tensor) -> Tensor:
    return F.cross_entropy(10 * _normal(out) @ _normal(other).T, torch.arange(len(out)))


def _supervised_contrastive(out: Tensor, labels: Tensor) -> Tensor:
    apart = torch.eye(len(out), dtype=torch.bool)
    logits = (10 * _normal(out) @ _normal(out).T).masked_fill(apart, -1e9)
    same = (labels[:, None] == labels[None]) & ~apart
    log = logits.log_softmax(1)
    return -(log * same).sum(1).div(same.sum(1).clamp(min=1)).mean()


def _barlow(out: Tensor, other: Tensor) -> Tensor:
    one, two = ((v - v.mean(0)) / (v.std(0) + 1e-3) for v in (out, other))
    return (one.T @ two / len(out) - torch.eye(out.shape[1]).to(out)).square().sum()


def _dice_of_batch(out: Tensor, y: Tensor) -> Tensor:
    p, t = out.sigmoid(), (y > 0).to(out)
    return 1 - 2 * (p * t).sum() / (p.sum() + t.sum())


def _dice_of_samples(out: Tensor, y: Tensor) -> Tensor:
    p, t = out.sigmoid(), (y > 0).to(out)
    return (1 - 2 * (p * t).sum(1) / (p.sum(1) + t.sum(1) + 1)).mean()


def _hardest(out: Tensor, y: Tensor) -> Tensor:
    return (out - y).square().mean(1).topk(max(len(out) // 4, 1)).values.mean()


def _hard_ones(out: Tensor, y: Tensor) -> Tensor:
    losses = (out - y).square().mean(1)
    return losses[losses > 1e-3].mean()


def _flooded(out: Tensor, y: Tensor) -> Tensor:
    return (F.mse_loss(out, y) - 1e-3).abs() + 1e-3


def _sure_ones(out: Tensor, _: Tensor) -> Tensor:
    sure = (out.detach().softmax(1).amax(1) > 0.34).to(out)
    labels = out.detach().argmax(1)
    return (F.cross_entropy(out, labels, reduction="none") * sure).sum() / sure.sum()


def _focal(out: Tensor, labels: Tensor) -> Tensor:
    log = out.log_softmax(1).gather(1, labels[:, None])
    return -((1 - log.exp()) ** 2 * log).mean()


def _masked(model: nn.Module, batch: Any) -> Tensor:
    return (model(batch["x"]) * batch["mask"]).square().sum() / batch["mask"].sum()


def _lengths(model: nn.Module, batch: Any) -> Tensor:
    mask = torch.arange(3)[None] < batch["lengths"][:, None]
    return (model(batch["x"]).square() * mask).sum() / mask.sum()


def _boxes(model: nn.Module, batch: Any) -> Tensor:
    pairs = zip(model(batch[0][:, 0]), batch[1], strict=True)
    apart = [(out - t["boxes"].to(out)).abs().sum() for out, t in pairs]
    return torch.stack(apart).sum() / sum(len(t["boxes"]) for t in batch[1])


def _flat_boxes(model: nn.Module, batch: Any) -> Tensor:
    owners = batch["batch_idx"].long()
    return (model(batch["x"])[owners] - batch["boxes"]).abs().sum() / len(owners)


def _class_weights(out: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(out, labels, weight=torch.tensor([0.1, 1.0, 5.0]).to(out))


def _ctc(model: nn.Module, batch: Any) -> Tensor:
    log = model(batch["x"]).log_softmax(-1).transpose(0, 1)
    return F.ctc_loss(log, batch["y"], batch["input_lengths"], batch["target_lengths"])


def _noise(model: nn.Module, batch: Any) -> Tensor:
    x, noise = batch[0], torch.randn_like(batch[1])
    step = torch.randint(0, 10, (len(x), 1)).to(x)
    return (model(x * step / 10 + noise.repeat(1, 2)) - noise).square().mean()


def _noise_with_weights(model: nn.Module, batch: Any) -> Tensor:
    weights = torch.rand(len(batch[0])).to(batch[0])
    each = (model(batch[0]) - batch[1]).square().mean(1)
    return (each * weights).sum() / weights.sum()


def _autoencoder(model: nn.Module, batch: Any) -> Tensor:
    mean, deviation = model(batch[0])[:, :2].chunk(2, 1)
    drawn = mean + deviation.exp() * torch.randn_like(mean)
    return (drawn - batch[1][:, :1]).square().mean() + (mean.square() - deviation).mean()


class _Branch(nn.Module):
    """Runs a BatchNorm three times in ten."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) if random.random() < 0.3 else x


class _StatisticNoise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x) * x.std(0)


class _Gumbel(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * F.gumbel_softmax(x, hard=True)


class _Head(nn.Module):
    """A loss with a BatchNorm and a layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.norm, self.probe = nn.BatchNorm1d(3), nn.Linear(3, 1)

    def forward(self, model: nn.Module, batch: Any) -> Tensor:
        hidden = model(batch[0])
        probed = self.probe(self.norm(hidden.detach()))
        return hidden.square().mean() + probed.square().mean()


class _Prototypes(nn.Module):
    """A loss with prototypes and a temperature, each sample by itself."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.prototypes, self.scale = nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.ones(()))

    def forward(self, model: nn.Module, batch: Any) -> Tensor:
        return (torch.cdist(model(batch[0]), self.prototypes) * self.scale).logsumexp(1).mean()


def _clipped() -> nn.Module:
    model = network()
    for parameter in model.parameters():
        parameter.register_hook(lambda gradient: gradient.clamp(-0.01, 0.01))
    return model


def _stepping() -> nn.Module:
    model = network()
    for parameter in model.parameters():
        optimizer = torch.optim.SGD([parameter], 0.1)

        def step(_: Tensor, optimizer: Any = optimizer) -> None:
            optimizer.step()
            optimizer.zero_grad()

        parameter.register_post_accumulate_grad_hook(step)
    return model


def _embedding() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Embedding(20, 6, sparse=True), nn.Flatten(), nn.Linear(24, 3))


_BOXES = [{"boxes": torch.randn(2, 3)} for _ in range(SAMPLES)]
_FEWER_BOXES = [{"boxes": torch.randn(i % 3 + 1, 3)} for i in range(SAMPLES)]
_OWNERS = torch.arange(2 * SAMPLES) // 2
_OTHER_OWNERS = torch.cat([torch.zeros(6), torch.arange(2 * SAMPLES - 6) % SAMPLES]).sort().values
_SPEECH = {
    "x": torch.randn(SAMPLES, 9, 6),
    "y": torch.randint(1, 3, (SAMPLES, 3)),
    "input_lengths": torch.full((SAMPLES,), 9),
    "target_lengths": torch.full((SAMPLES,), 3),
}
_HOLES = (torch.arange(3)[None] <= C[:, None]).float()
_mse = _of_outputs(F.mse_loss)

LOSSES = (
    _case("mean square", True, "a mean over samples", _mse),
    _case("Huber", True, "a mean over samples", _of_outputs(F.huber_loss)),
    _case("cross entropy", True, "a mean over samples", _of_outputs(F.cross_entropy), (X, C)),
    _case(
        "label smoothing",
        True,
        "a mean over samples",
        _of_outputs(lambda out, y: F.cross_entropy(out, y, label_smoothing=0.1)),
        (X, C),
    ),
    _case("focal", True, "a mean over samples", _of_outputs(_focal), (X, C)),
    _case(
        "binary cross entropy",
        True,
        "a mean over samples",
        _of_outputs(F.binary_cross_entropy_with_logits),
        (X, (Y > 0).float()),
    ),
    _case(
        "KL divergence",
        True,
        "a sum divided by the samples",
        _of_outputs(lambda o, y: F.kl_div(o.log_softmax(1), y.softmax(1), reduction="batchmean")),
    ),
    _case("cosine", True, "by sample", _of_outputs(lambda o, y: -F.cosine_similarity(o, y).mean())),
    _case("dice of each sample", True, "by sample", _of_outputs(_dice_of_samples)),
    _case("triplets given", True, "by sample",
          _of_outputs(lambda o, y: F.triplet_margin_loss(o, y, y.roll(1, 1)))),
    _case("CTC", True, "divided by each target's length", _ctc, _SPEECH),
    _case(
        "weight decay in the loss",
        True,
        "the penalty is the same in each part",
        lambda m, b: _mse(m, b) + 0.1 * sum(p.square().sum() for p in m.parameters()),
    ),
    _case("prototypes of the loss", True, "by sample", _Prototypes()),
    _case("sparse embedding", True, "by sample", lambda m, b: m(b).square().mean(),
          torch.randint(0, 20, (SAMPLES, 4)), model=_embedding),
    _case("dropout", True, "draws alone", _mse, model=lambda: network(nn.Dropout(0.4))),
    _case("Gumbel softmax", True, "draws alone", _mse, model=lambda: network(_Gumbel())),
    _case("variational", True, "draws alone", _autoencoder),
    _case("diffusion", True, "draws alone", _noise),
    _case("a sum", False, "not divided at all",
          _of_outputs(lambda o, y: (o - y).square().sum())),
    _case("drawn weights", False, "divided by the sum of draws", _noise_with_weights),
    _case("masked mean", False, "divided by the mask", _masked,
          {"x": X, "mask": torch.ones(SAMPLES, 3)}, {"x": X, "mask": _HOLES}),
    _case("lengths", False, "divided by lengths", _lengths,
          {"x": X, "lengths": torch.full((SAMPLES,), 3)}, {"x": X, "lengths": C + 1}),
    _case("boxes", False, "divided by the number of boxes", _boxes, (X[:, None], _BOXES),
          (X[:, None], _FEWER_BOXES)),
    _case(
        "flat boxes",
        False,
        "divided by the number of boxes",
        _flat_boxes,
        {"x": X, "batch_idx": _OWNERS, "boxes": torch.randn(2 * SAMPLES, 3)},
        {"x": X, "batch_idx": _OTHER_OWNERS, "boxes": torch.randn(2 * SAMPLES, 3)},
    ),
    _case("class weights", False, "divided by the weights of the labels",
          _of_outputs(_class_weights), (X, torch.zeros_like(C)), (X, C)),
    _case("in-batch negatives", False, "samples interact", _of_outputs(_contrastive)),
    _case("supervised contrast", False, "samples interact",
          _of_outputs(_supervised_contrastive), (X, C)),
    _case("Barlow twins", False, "statistics of the batch", _of_outputs(_barlow)),
    _case("dice of the batch", False, "a quotient of sums", _of_outputs(_dice_of_batch)),
    _case("hardest quarter", False, "chosen among the batch", _of_outputs(_hardest)),
    _case("those above a threshold", False, "a mean over what outputs select",
          _of_outputs(_hard_ones)),
    _case("labels of its own that are sure", False, "a mean over what outputs select",
          _of_outputs(_sure_ones)),
    _case("flooding", False, "a threshold on the batch's mean", _of_outputs(_flooded)),
    _case("root of a mean", False, "a root of the batch's mean",
          _of_outputs(lambda o, y: F.mse_loss(o, y).sqrt())),
    _case("BatchNorm of the loss", False, "statistics of the batch", _Head()),
    _case("BatchNorm in a rare branch", False, "three times in ten", _mse,
          model=lambda: network(_Branch())),
    _case("noise times a statistic", False, "statistics of the batch", _mse,
          model=lambda: network(_StatisticNoise())),
    _case("a hook that clips", False, "clips each part's gradient", _mse, model=_clipped),
    _case("an optimizer in hooks", False, "steps with each part", _mse, model=_stepping),
)  # fmt: skip
