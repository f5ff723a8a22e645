"""Shapes of ops that PyTorch has no shape rule for: found by running them on zeros, on the CPU.

Invariant: inputs of at most `MOST_BYTES` are made, and none on an accelerator.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from autobatch.errors import WorkloadError
from autobatch.support.torch_private import FakeTensor, no_dispatch, tree_map, tree_unflatten
from autobatch.support.units import MIB, format_bytes

__all__ = ["run_on_cpu"]

MOST_BYTES = 256 * MIB


def run_on_cpu(
    mode: Any, func: Any, flat_args: Sequence[Any], args_spec: Any, error: RuntimeError
) -> Any:
    """Run an op in place of FakeTensorMode's fallback, which would run it on the device itself.

    Raises:
        WorkloadError: the op is too large for this, or fails on zeros.
    """
    fakes = [leaf for leaf in flat_args if isinstance(leaf, FakeTensor)]
    needed = sum(fake.untyped_storage().nbytes() for fake in fakes)
    if torch.Tag.inplace_view in func.tags or needed > MOST_BYTES:
        raise WorkloadError(
            f"{func.name()} has no shape rule in this PyTorch, and its {format_bytes(needed)} of "
            "inputs are too much to run it on the CPU instead"
        ) from error
    device = next((f.fake_device for f in fakes if f.fake_device.type != "cpu"), None)
    originals: dict[int, FakeTensor] = {}

    def real(leaf: Any) -> Any:
        if not isinstance(leaf, FakeTensor):
            return leaf
        zeros = torch.zeros(leaf.shape, dtype=leaf.dtype, device="cpu")
        originals[id(zeros)] = leaf
        return zeros

    def fake(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if id(leaf) in originals:
            return originals[id(leaf)]
        elem = torch.empty_strided(leaf.size(), leaf.stride(), dtype=leaf.dtype, device="meta")
        return FakeTensor(mode, elem, device or leaf.device)

    with no_dispatch():
        args, kwargs = tree_unflatten([real(leaf) for leaf in flat_args], args_spec)
        try:
            output = func(*args, **kwargs)
        except Exception as failure:
            raise WorkloadError(
                f"{func.name()} has no shape rule in this PyTorch, and does not run on the CPU "
                f"instead: {str(failure).splitlines()[0].split('. ')[0]}"
            ) from failure
        return tree_map(fake, output)
