"""Weights that are made of other tensors, as quantized ones are, take the bytes of these."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.simulated import WIDTH, largest, nbytes, run


class Int8(Tensor):
    """A weight of whole numbers and a scale for each row, which says that it is of floats."""

    numbers: Tensor
    scales: Tensor

    @staticmethod
    def __new__(cls, numbers: Tensor, scales: Tensor) -> Int8:
        return Tensor._make_wrapper_subclass(  # type: ignore[attr-defined, no-any-return]
            cls, numbers.shape, dtype=scales.dtype, device=numbers.device
        )

    def __init__(self, numbers: Tensor, scales: Tensor) -> None:
        self.numbers, self.scales = numbers, scales

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["numbers", "scales"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], context: Any, *layout: Any) -> Int8:
        return Int8(inner["numbers"], inner["scales"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any, kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return Int8(args[0].numbers.detach(), args[0].scales.detach())
        plain = [
            arg.numbers.to(arg.scales.dtype) * arg.scales if isinstance(arg, Int8) else arg
            for arg in args
        ]
        return func(*plain, **(kwargs or {}))


class Quantized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        numbers = torch.ones(4 * WIDTH, WIDTH, dtype=torch.int8)
        weight = Int8(numbers, torch.ones(4 * WIDTH, 1))
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.head = nn.Linear(4 * WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.linear(x, self.weight))


def test_quantized_weights_count_what_they_are_made_of():
    model = Quantized()
    trace = run(model, loss=lambda model, batch: model(batch).mean())
    weight = 4 * WIDTH * WIDTH + 4 * WIDTH * 4
    assert largest(trace, "parameters") == weight + nbytes(model.head)
    assert type(model.weight.data) is Int8
    assert model.weight.numbers.device.type == "cpu"
