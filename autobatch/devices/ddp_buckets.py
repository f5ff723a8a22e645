"""The buffers in which DistributedDataParallel averages gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from autobatch.workload.workload import Workload
from autobatch.workload.wrappers import is_data_parallel

__all__ = ["gradient_buckets"]

_BUCKET_BYTES = 25 * 2**20
"""Default `bucket_cap_mb` of DistributedDataParallel."""


def gradient_buckets(workload: Workload, model: nn.Module) -> list[Tensor]:
    """Make the buckets for a copied model; none where no DistributedDataParallel will run.

    A wrapper around the user's model says how large they are. With `gradient_as_bucket_view` the
    gradients live in the buckets, and nothing comes on top. DDP makes the buckets anew after its
    first window, in the order in which gradients came: about that of the parameters, reversed.
    """
    wrapper: Any = workload.model if is_data_parallel(workload.model) else None
    shares = workload.shares or ("ddp" if wrapper is not None else None)
    if shares != "ddp" or (wrapper is not None and wrapper.gradient_as_bucket_view):
        return []
    limit = getattr(wrapper, "bucket_bytes_cap", _BUCKET_BYTES)
    full: list[list[nn.Parameter]] = []
    filling: dict[torch.dtype, list[nn.Parameter]] = {}
    for parameter in reversed([p for p in model.parameters() if p.requires_grad]):
        bucket = filling.setdefault(parameter.dtype, [])
        bucket.append(parameter)
        if sum(p.nbytes for p in bucket) >= limit:
            full.append(filling.pop(parameter.dtype))
    return [
        torch.zeros(sum(p.numel() for p in bucket), dtype=bucket[0].dtype, device=bucket[0].device)
        for bucket in (*full, *filling.values())
    ]
