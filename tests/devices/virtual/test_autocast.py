"""Autocast on the virtual device is CUDA's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tests.support.seen import Seen
from tests.support.simulated import (
    WIDTH,
    largest,
    mlp,
    nbytes,
    run,
)


def test_bf16_autocast_casts_weights_once_per_micro_batch_and_keeps_gradients_in_fp32():
    model = mlp(depth=3)
    trace = run(model, autocast="bf16", steps=2)
    casts = [b for b in trace.blocks if b.op == "aten::_to_copy" and b.phase == "forward"]
    weights = list(model.parameters())
    # 2 windows of 2 micro-batches: every weight once each, and the input
    assert len(casts) == 4 * (len(weights) + 1)
    assert largest(trace, "gradients") == nbytes(model)


def test_autocast_follows_cudas_policy():
    seen = Seen()

    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        hidden = model(batch)
        seen.append(("linear", hidden.dtype))
        seen.append(("softmax", hidden.softmax(-1).dtype))
        seen.append(("sum", hidden.sum().dtype))
        seen.append(("layer_norm", F.layer_norm(hidden, (WIDTH,)).dtype))
        seen.append(("gelu", F.gelu(hidden).dtype))
        seen.append(("bmm", torch.bmm(hidden[None], hidden.t()[None]).dtype))
        seen.append(("add", (hidden + batch).dtype))
        seen.append(("addcmul", torch.addcmul(hidden, hidden, batch).dtype))
        seen.append(("pow", hidden.pow(2).dtype))
        return hidden.float().pow(2).mean()

    run(mlp(), loss=loss, autocast="bf16")
    half, full = torch.bfloat16, torch.float32
    assert dict(seen) == {
        "linear": half,
        "softmax": full,
        "sum": full,
        "layer_norm": full,
        "gelu": half,
        "bmm": half,
        "add": full,
        "addcmul": full,
        "pow": full,
    }
