"""Ops whose allocations are not plain, each as a small model that trains.

What follows from PyTorch's source is checked by it: the same steps run on the bench and on a
simulated GPU (`test_operators.py`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["CASES", "Case", "loss_of"]

ROWS, WIDTH = 64, 96
CHANNELS, SIDE = 16, 24
NHWC = torch.channels_last


class Elements(nn.Module):
    """Applies an op to `y`, which needs a gradient, and `x`, which does not."""

    def __init__(self, op: Callable[[Elements, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.op = op
        self.scale, self.one = nn.Parameter(torch.ones(WIDTH)), nn.Parameter(torch.ones(1))
        self.register_buffer("low", torch.zeros(()))
        self.register_buffer("high", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.op(self, x * self.scale, x)


class Convolved(nn.Module):
    """A convolution of images, or of a slice of them, whose output may become rows."""

    def __init__(self, conv: nn.Module, *, prepare: Callable[[Tensor], Tensor], rows: bool) -> None:
        super().__init__()
        self.conv, self.prepare, self.rows = conv, prepare, rows
        self.scale, self.head = nn.Parameter(torch.ones(1)), nn.Linear(2 * CHANNELS, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(self.prepare(x * self.scale))
        found: Tensor = self.head(y.flatten(2).transpose(1, 2) if self.rows else y.mean((2, 3)))
        return found


class Transposed(nn.Module):
    """An op between linear layers that gets data, or a gradient, which is transposed in memory."""

    def __init__(self, op: Callable[[Tensor], Tensor], *, data: bool, gradient: bool) -> None:
        super().__init__()
        self.op, self.data, self.gradient = op, data, gradient
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(ROWS if gradient else WIDTH, 8)
        self.norm = nn.BatchNorm1d(ROWS)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        if self.data:
            y = y.transpose(1, 2).contiguous().transpose(1, 2)
        y = self.norm(y) if self.op is _normalized else self.op(y)
        found: Tensor = self.last(y.transpose(1, 2) if self.gradient else y)
        return found


class Steps(nn.Module):
    """A recurrent cell over rows, one step after the other."""

    def __init__(self, cell: type[nn.Module], *, rows: int, bias: bool) -> None:
        super().__init__()
        self.rows = rows
        self.cell, self.last = cell(WIDTH, 2 * WIDTH, bias=bias), nn.Linear(2 * WIDTH, 8)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for row in x.flatten(0, 1).split(self.rows):
            state = self.cell(row, state)
        found: Tensor = self.last(state[0] if isinstance(state, tuple) else state)
        return found


@dataclass(frozen=True)
class Case:
    """A model and the shape of one of its samples."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).float().square().mean()


def _classes(x: Tensor) -> Tensor:
    return torch.zeros(len(x) * ROWS, dtype=torch.long, device=x.device)


def _places(x: Tensor, count: int) -> Tensor:
    return torch.arange(count, device=x.device)


def _no_places(x: Tensor) -> Tensor:
    return torch.zeros_like(x, dtype=torch.long)


def _weights(x: Tensor) -> Tensor:
    return torch.ones(WIDTH, device=x.device)


with_logits = F.binary_cross_entropy_with_logits

_OPS: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "maximum": lambda m, y, x: torch.maximum(y, x),
    "minimum of two": lambda m, y, x: torch.minimum(y, m.one * x),
    "clamp by numbers": lambda m, y, x: y.clamp(0, 1),
    "clamp by tensors": lambda m, y, x: torch.clamp(y, m.low, m.high),
    "clamp from below": lambda m, y, x: torch.clamp_min(y, m.low),
    "bce": lambda m, y, x: F.binary_cross_entropy(y.sigmoid(), x.sigmoid()),
    "bce, target": lambda m, y, x: F.binary_cross_entropy(y.sigmoid(), (2 * y).sigmoid()),
    "logits": lambda m, y, x: with_logits(y, x.sigmoid()),
    "logits, positive": lambda m, y, x: with_logits(y, x.sigmoid(), pos_weight=_weights(x)),
    "logits, weights": lambda m, y, x: with_logits(y, x.sigmoid(), weight=_weights(x)),
    "logits, each": lambda m, y, x: with_logits(y, x.sigmoid(), reduction="none"),
    "logits, sum": lambda m, y, x: with_logits(y, x.sigmoid(), reduction="sum"),
    "mse": lambda m, y, x: F.mse_loss(y, x),
    "mse, each": lambda m, y, x: F.mse_loss(y, x, reduction="none"),
    "smooth l1": lambda m, y, x: F.smooth_l1_loss(y, x),
    "huber": lambda m, y, x: F.huber_loss(y, x),
    "l1": lambda m, y, x: F.l1_loss(y, x),
    "divergence": lambda m, y, x: F.kl_div(y.log_softmax(-1), x.softmax(-1), reduction="sum"),
    "smoothed": lambda m, y, x: F.cross_entropy(y.flatten(0, 1), _classes(x), label_smoothing=0.1),
    "probabilities": lambda m, y, x: F.cross_entropy(y.flatten(0, 1), x.flatten(0, 1).softmax(-1)),
    "max": lambda m, y, x: y.max(),
    "max of rows": lambda m, y, x: y.max(-1)[0],
    "amax": lambda m, y, x: y.amax(-1),
    "median": lambda m, y, x: y.median(-1)[0],
    "cummax": lambda m, y, x: y.cummax(-1)[0],
    "cumsum": lambda m, y, x: y.cumsum(-1),
    "logsumexp": lambda m, y, x: y.logsumexp(-1),
    "norm": lambda m, y, x: y.norm(dim=-1),
    "deviation": lambda m, y, x: y.std(-1),
    "normalize": lambda m, y, x: F.normalize(y, dim=-1),
    "take": lambda m, y, x: y.take(_places(x, 90)),
    "gather": lambda m, y, x: y.gather(-1, _no_places(x)),
    "index_select": lambda m, y, x: y.index_select(-1, _places(x, 64)),
    "index_add": lambda m, y, x: torch.zeros_like(y).index_add(-1, _places(x, WIDTH), y),
    "scatter_reduce": lambda m, y, x: torch.zeros_like(y).scatter_reduce(
        -1, _no_places(x), y, "amax"
    ),
    "topk": lambda m, y, x: y.topk(5, -1)[0],
    "sort": lambda m, y, x: y.sort(-1)[0],
    "masked": lambda m, y, x: y.masked_fill(torch.ones_like(x, dtype=torch.bool), 0.0),
    "where": lambda m, y, x: torch.where(x > 0, y, m.one),
    "var": lambda m, y, x: y.var(0),
    "any": lambda m, y, x: (y > 0).any(1) * y.mean(),
    "all": lambda m, y, x: (y > 0).all() * y.mean(),
    "argmax": lambda m, y, x: y.argmax() * y.mean(),
    "count": lambda m, y, x: torch.count_nonzero(y, 1) * y.mean(),
    "one hot": lambda m, y, x: y.unsqueeze(-1) * F.one_hot(_no_places(x), 7),
    "unfold": lambda m, y, x: y.unfold(-1, 4, 2),
    "roll": lambda m, y, x: y.roll(1, -1),
    "reflected": lambda m, y, x: F.pad(y, (1, 2), mode="reflect"),
    "interpolated": lambda m, y, x: F.interpolate(y, scale_factor=2, mode="linear"),
    "einsum": lambda m, y, x: torch.einsum("bij,bkj->bik", y, y),
    "transposed softplus": lambda m, y, x: F.softplus(y.transpose(-1, -2)).sum(0),
    "glu": lambda m, y, x: F.glu(y),
    "mish": lambda m, y, x: F.mish(y),
}


def _normalized(x: Tensor) -> Tensor:
    raise AssertionError("the model has a layer for it")


_LAID_OUT: dict[str, Callable[[Tensor], Tensor]] = {
    "batch norm": _normalized,
    "layer norm": lambda x: F.layer_norm(x, (WIDTH,)),
    "rms norm": lambda x: F.rms_norm(x, (WIDTH,)),
    "group norm": lambda x: F.group_norm(x, 4),
    "softmax": lambda x: x.softmax(-1),
    "log softmax": lambda x: x.log_softmax(-1),
    "softplus": F.softplus,
    "elu": F.elu,
    "gelu": F.gelu,
    "silu": F.silu,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "dropout": F.dropout,
    "running sum": lambda x: x.cumsum(-1),
    "largest": lambda x: x.topk(WIDTH, -1)[0],
    "sorted": lambda x: x.sort(-1)[0],
    "gathered": lambda x: x.gather(-1, _no_places(x)),
}


def _transposed() -> dict[str, Callable[[], nn.Module]]:
    return {
        f"{name}, transposed {what}": lambda op=op, what=what: Transposed(  # type: ignore[misc]
            op, data="data" in what, gradient="gradient" in what
        )
        for name, op in _LAID_OUT.items()
        for what in ("data", "gradient", "data and gradient")
    }


def _conv(weight: torch.memory_format = torch.contiguous_format, **options: Any) -> nn.Module:
    layer = nn.Conv2d(CHANNELS, 2 * CHANNELS, options.pop("kernel", 3), padding=1, **options)
    return layer.to(memory_format=weight)


def _as_it_is(x: Tensor) -> Tensor:
    return x


def _nhwc(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=NHWC)


def _sliced(x: Tensor) -> Tensor:
    return x[..., 1:]


def _sliced_nhwc(x: Tensor) -> Tensor:
    return _sliced(_nhwc(x))


_IMAGES: dict[str, Callable[[Tensor], Tensor]] = {
    "max pool": lambda x: F.max_pool2d(x, 3, 2, 1),
    "mean pool": lambda x: F.avg_pool2d(x, 2),
    "nearest": lambda x: F.interpolate(x, scale_factor=2),
    "bilinear": lambda x: F.interpolate(x, (30, 20), mode="bilinear"),
    "bicubic": lambda x: F.interpolate(x, (30, 20), mode="bicubic"),
    "columns": lambda x: F.unfold(x, 3),
    "patches": lambda x: F.fold(F.unfold(x, 2, stride=2), (SIDE, SIDE), 2, stride=2),
}


class Image(nn.Module):
    """An op on images, in NCHW or in NHWC."""

    def __init__(self, op: Callable[[Tensor], Tensor], *, nhwc: bool) -> None:
        super().__init__()
        self.op, self.nhwc, self.scale = op, nhwc, nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.scale
        return 2 * self.op(_nhwc(x) if self.nhwc else x)


def _cells() -> dict[str, Case]:
    """Return cells over few samples, and over so many that sums over them are split."""
    found = {}
    for cell in (nn.RNNCell, nn.LSTMCell, nn.GRUCell):
        for bias in (True, False):
            for rows in (ROWS, 8192):
                name = f"{cell.__name__}{'' if bias else ' without bias'}, {rows} samples"
                build = functools.partial(Steps, cell, rows=rows, bias=bias)
                found[name] = Case(build, (rows, WIDTH))
    return found


def _images() -> dict[str, Callable[[], nn.Module]]:
    return {
        f"{name}{' in nhwc' * nhwc}": lambda op=op, nhwc=nhwc: Image(  # type: ignore[misc]
            op, nhwc=nhwc
        )
        for name, op in _IMAGES.items()
        for nhwc in (False, True)
    }


def _convolutions() -> dict[str, Callable[[], nn.Module]]:
    found: dict[str, Callable[[], nn.Module]] = {}
    for prepare in (_as_it_is, _nhwc, _sliced, _sliced_nhwc):
        for rows in (False, True):
            for name, layer in {
                "conv": _conv,
                "conv in nhwc": lambda: _conv(NHWC),
                "without bias": lambda: _conv(bias=False),
                "of one pixel": lambda: _conv(kernel=1),
                "in groups": lambda: _conv(groups=2),
                "depthwise": lambda: _conv(groups=CHANNELS),
                "transposed": lambda: nn.ConvTranspose2d(CHANNELS, 2 * CHANNELS, 2, stride=2),
            }.items():
                key = f"{name}, {prepare.__name__.strip('_')}{', rows' * rows}"
                found[key] = lambda layer=layer, prepare=prepare, rows=rows: Convolved(
                    layer(), prepare=prepare, rows=rows
                )
    return found


CASES = {
    **{
        name: Case(lambda op=op: Elements(op), (ROWS, WIDTH))  # type: ignore[misc]
        for name, op in _OPS.items()
    },
    **{name: Case(build, (ROWS, WIDTH)) for name, build in _transposed().items()},
    **_cells(),
    **{name: Case(build, (CHANNELS, SIDE, SIDE)) for name, build in _images().items()},
    **{name: Case(build, (CHANNELS, SIDE, SIDE)) for name, build in _convolutions().items()},
}
