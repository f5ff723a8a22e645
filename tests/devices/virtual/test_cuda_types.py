"""Generators and legacy tensor types of CUDA."""

from __future__ import annotations

import torch

from tests.support.simulated import mlp, run


def test_generators_on_the_gpu_are_generators():
    original = torch.Generator

    def loss(model, x):
        generator = torch.Generator(device="cuda")
        assert isinstance(generator, original)
        assert isinstance(original(), torch.Generator)
        assert generator.manual_seed(3).device == x.device
        noise = torch.randn(x.shape, generator=generator, device=x.device)
        noise.normal_(generator=generator)
        return model(x + noise).sum()

    run(mlp(), loss=loss)
    assert torch.Generator is original


def test_legacy_types_are_on_the_gpu():
    def loss(model, x):
        assert x.type() == "torch.cuda.FloatTensor"
        assert isinstance(x, torch.cuda.FloatTensor)
        assert not isinstance(x.cpu(), torch.cuda.FloatTensor)
        half = x.type(torch.cuda.HalfTensor)
        assert (half.is_cuda, half.dtype) == (True, torch.float16)
        zeros = torch.cuda.FloatTensor(3, 2).fill_(0)
        assert (zeros.device, tuple(zeros.shape)) == (x.device, (3, 2))
        return model(x).sum()

    run(mlp(), loss=loss)
