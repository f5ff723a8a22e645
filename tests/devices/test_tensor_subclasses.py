"""Weights and optimizer state whose class keeps fewer bytes than it seems to have."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import autobatch

WIDTH = 1024


class Packed(Tensor):
    """A matrix in one byte a number and a scale a row, which ops unpack; as torchao's are."""

    @staticmethod
    def __new__(cls, codes: Tensor, scales: Tensor) -> Packed:
        return torch.Tensor._make_wrapper_subclass(
            cls, codes.shape, dtype=scales.dtype, device=codes.device
        )

    def __init__(self, codes: Tensor, scales: Tensor) -> None:
        self.codes, self.scales = codes, scales

    @classmethod
    def zeros(cls, like: Tensor) -> Packed:
        codes = torch.zeros(like.shape, dtype=torch.int8, device=like.device)
        return cls(codes, torch.zeros(len(like), 1, dtype=like.dtype, device=like.device))

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scales"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: Any, context: None, size: Any, stride: Any) -> Packed:
        return cls(inner["codes"], inner["scales"])

    def unpacked(self) -> Tensor:
        return self.codes * self.scales

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(func(args[0].codes), func(args[0].scales))
        if func is torch.ops.aten.copy_.default and isinstance(args[0], Packed):
            args[0].codes.copy_(args[1].round().to(torch.int8))
            return args[0]
        plain = tree_map(lambda x: x.unpacked() if isinstance(x, Packed) else x, args)
        return func(*plain, **(kwargs or {}))


class PackedMomentum(torch.optim.Optimizer):
    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            if not state:
                state["sum"] = Packed.zeros(parameter)
            total = state["sum"] * 0.9 + parameter.grad
            state["sum"].copy_(total)
            parameter.sub_(total)


def predicted(model: nn.Module, **options: Any) -> autobatch.Footprint:
    return autobatch.predict(
        model, micro_batch=2, sample=torch.ones(1, WIDTH), loss=lambda m, x: m(x).mean(), gpu="t4",
        **options,
    )  # fmt: skip


def test_packed_weights_count_by_the_bytes_that_they_hold() -> None:
    packed = nn.Linear(WIDTH, WIDTH, bias=False)
    weight = Packed.zeros(torch.ones(WIDTH, WIDTH))
    packed.weight = nn.Parameter(weight, requires_grad=False)
    codes = packed.weight.codes
    model = nn.Sequential(packed, nn.Linear(WIDTH, 8))
    footprint = predicted(model, optimizer=torch.optim.SGD)
    assert footprint.parameters_bytes == WIDTH * WIDTH + 4 * WIDTH + 4 * (8 * WIDTH + 8)
    assert model[0].weight.codes is codes and type(codes) is Tensor


def test_packed_state_counts_by_the_bytes_that_it_holds() -> None:
    model = nn.Linear(WIDTH, WIDTH, bias=False)
    made = predicted(model, optimizer=PackedMomentum)
    assert made.optimizer_bytes == WIDTH * WIDTH + 4 * WIDTH


def test_packed_state_of_an_optimizer_that_has_stepped_is_copied_as_it_is() -> None:
    model = nn.Linear(WIDTH, WIDTH, bias=False)
    optimizer = PackedMomentum(model.parameters())
    model(torch.ones(1, WIDTH)).mean().backward()
    optimizer.step()
    model.weight.grad = None
    kept = optimizer.state[model.weight]["sum"]
    made = predicted(model, optimizer=optimizer)
    assert made.optimizer_bytes == WIDTH * WIDTH + 4 * WIDTH
    assert optimizer.state[model.weight]["sum"] is kept and type(kept.codes) is Tensor


def test_packed_weights_can_be_trained_and_say_that_they_are_on_the_card() -> None:
    model = nn.Linear(WIDTH, WIDTH, bias=False)
    model.weight = nn.Parameter(Packed.zeros(torch.ones(WIDTH, WIDTH)))

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        assert model.weight.device == torch.device("cuda", 0) and model.weight.is_cuda
        return model(x).mean()  # type: ignore[no-any-return]

    footprint = autobatch.predict(
        model, micro_batch=2, sample=torch.ones(1, WIDTH), loss=loss, optimizer=PackedMomentum,
        gpu="t4",
    )  # fmt: skip
    packed = WIDTH * WIDTH + 4 * WIDTH
    assert (footprint.parameters_bytes, footprint.optimizer_bytes) == (packed, packed)
    assert footprint.gradients_bytes == 4 * WIDTH * WIDTH
