"""The buffers in which DistributedDataParallel averages gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from autobatch.workload.workload import Workload
from autobatch.workload.wrappers import is_data_parallel

__all__ = ["GradientBuckets", "gradient_buckets"]

_BUCKET_BYTES = 25 * 2**20
"""Default `bucket_cap_mb` of DistributedDataParallel."""


@dataclass(slots=True)
class GradientBuckets:
    """The buckets of a copied model, which DDP holds as long as it lives.

    Attributes:
        tensors: the buckets.
        views: the place of each parameter's gradient in them, by the parameter's id; empty unless
            gradients live there, as `gradient_as_bucket_view=True` has it.
    """

    tensors: list[Tensor]
    views: dict[int, Tensor]

    def move(self, parameter: Tensor) -> None:
        """Put a gradient that a backward pass has completed into its place, as DDP's reducer does.

        What held it before is freed. The buckets stay when gradients are dropped.
        """
        gradient, place = parameter.grad, self.views.get(id(parameter))
        if place is None or gradient is None or gradient is place:
            return
        if gradient.layout == torch.strided and gradient.dtype == place.dtype:
            place.copy_(gradient)
            parameter.grad = place


def gradient_buckets(workload: Workload, model: nn.Module) -> GradientBuckets:
    """Make the buckets for a copied model; none where no DistributedDataParallel will run.

    A wrapper around the user's model says how large they are, and whether gradients live in them.
    DDP makes the buckets anew after its first window, in the order in which gradients came: about
    that of the parameters, reversed.
    """
    wrapper: Any = workload.model if is_data_parallel(workload.model) else None
    shares = workload.shares or ("ddp" if wrapper is not None else None)
    if shares != "ddp":
        return GradientBuckets([], {})
    limit = getattr(wrapper, "bucket_bytes_cap", _BUCKET_BYTES)
    full: list[list[nn.Parameter]] = []
    filling: dict[torch.dtype, list[nn.Parameter]] = {}
    for parameter in reversed([p for p in model.parameters() if p.requires_grad]):
        bucket = filling.setdefault(parameter.dtype, [])
        bucket.append(parameter)
        if sum(p.nbytes for p in bucket) >= limit:
            full.append(filling.pop(parameter.dtype))
    every = [*full, *filling.values()]
    tensors = [
        torch.zeros(sum(p.numel() for p in bucket), dtype=bucket[0].dtype, device=bucket[0].device)
        for bucket in every
    ]
    as_views = getattr(wrapper, "gradient_as_bucket_view", workload.gradient_as_bucket_view)
    if not as_views:
        return GradientBuckets(tensors, {})
    views: dict[int, Tensor] = {}
    for bucket, tensor in zip(every, tensors, strict=True):
        for parameter, part in zip(bucket, tensor.split([p.numel() for p in bucket]), strict=True):
            views[id(parameter)] = part.view(parameter.shape)
    return GradientBuckets(tensors, views)
