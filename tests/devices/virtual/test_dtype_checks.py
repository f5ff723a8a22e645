"""Dtypes that PyTorch refuses are refused before a plan is made, and no others are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import autobatch
from autobatch.errors import WorkloadError

WIDTH = 16
FLOATS = torch.ones(1, WIDTH)
IMAGES = torch.ones(1, 3, 8, 8)


def predict(model: nn.Module, sample: Any, loss: Any = None, **options: Any) -> None:
    autobatch.predict(
        model, micro_batch=2, sample=sample, gpu="t4",
        loss=loss or (lambda model, x: model(x).mean()), **options,
    )  # fmt: skip


def compared(function: Any) -> Any:
    return lambda model, batch: function(model(batch[0]), batch[1])


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64, torch.float16])
@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Linear(WIDTH, 3),
        lambda: nn.LayerNorm(WIDTH),
        lambda: nn.Sequential(nn.Unflatten(1, (WIDTH, 1)), nn.GroupNorm(4, WIDTH)),
        lambda: nn.Sequential(nn.Unflatten(1, (1, WIDTH)), nn.Conv1d(1, 2, 3)),
        lambda: nn.Sequential(nn.Unflatten(1, (1, WIDTH)), nn.Linear(WIDTH, 2)),
    ],
)
def test_layers_refuse_inputs_of_another_dtype(make: Any, dtype: torch.dtype) -> None:
    with pytest.raises(WorkloadError, match=f"{dtype}|Input type"):
        predict(make(), FLOATS.to(dtype))


@pytest.mark.parametrize(
    ("model", "sample", "loss"),
    [
        (nn.Linear(WIDTH, 4), (FLOATS, torch.ones(1, dtype=torch.int32)), F.cross_entropy),
        (nn.Linear(WIDTH, 4), (FLOATS, torch.ones(1, 4).long()),
         lambda out, labels: F.binary_cross_entropy(out.sigmoid(), labels)),
        (nn.Linear(WIDTH, 4), (FLOATS, torch.ones(1, 3)), lambda out, at: out[:, at].sum()),
        (nn.Linear(WIDTH, 4), (FLOATS, torch.ones(1, 4).long()),
         lambda out, labels: out.sum() * labels.softmax(1).sum()),
        (nn.Linear(WIDTH, 4), (FLOATS, torch.ones(1, 4, 4).long()),
         lambda out, numbers: out.sum() * (numbers @ numbers).sum()),
        (nn.Embedding(4, 4), (torch.ones(1, 5), FLOATS), lambda out, other: out.mean()),
    ],
)  # fmt: skip
def test_losses_and_lookups_refuse_what_they_refuse_in_training(
    model: nn.Module, sample: Any, loss: Any
) -> None:
    with pytest.raises(WorkloadError, match="Error: "):
        predict(model, sample, compared(loss))


@pytest.mark.parametrize(
    ("model", "sample", "loss", "options"),
    [
        (nn.BatchNorm1d(WIDTH), FLOATS.half(), None, {}),
        (nn.Embedding(4, 4), torch.ones(1, 5, dtype=torch.int32), None, {}),
        (nn.Linear(WIDTH, 4), (FLOATS, torch.ones(1).long()), compared(F.cross_entropy), {}),
        (nn.Linear(WIDTH, 4), (FLOATS, torch.ones(1, 4) > 0),
         compared(lambda out, mask: (out * mask).masked_fill(mask, 0.0).mean()), {}),
        (nn.Sequential(nn.Linear(WIDTH, 4), nn.LayerNorm(4)), FLOATS.half(), None,
         {"autocast": "fp16"}),
        (nn.Conv2d(3, 4, 3), IMAGES, None, {"autocast": "bf16"}),
        (nn.Linear(WIDTH, 5), FLOATS[:, None].expand(1, 9, WIDTH), lambda model, x: F.ctc_loss(
            model(x).log_softmax(2).transpose(0, 1), torch.ones(len(x), 3).long(),
            torch.full((len(x),), 9), torch.full((len(x),), 3)), {}),
    ],
)  # fmt: skip
def test_what_training_accepts_is_accepted(
    model: nn.Module, sample: Any, loss: Any, options: Any
) -> None:
    predict(model, sample, loss, **options)


@pytest.mark.parametrize("function", [F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss])
def test_losses_of_whole_numbers_are_what_they_are_in_this_pytorch(function: Any) -> None:
    labels = torch.ones(1, 4).long()
    try:
        function(nn.Linear(WIDTH, 4)(FLOATS), labels).backward()
    except RuntimeError as error:
        with pytest.raises(WorkloadError, match=str(error).splitlines()[0]):
            predict(nn.Linear(WIDTH, 4), (FLOATS, labels), compared(function))
    else:
        predict(nn.Linear(WIDTH, 4), (FLOATS, labels), compared(function))
