"""Code that was written for one GPU says "cuda", reads values and logs them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import autobatch
from tests.support.seen import Seen
from tests.support.simulated import (
    WIDTH,
    mlp,
    ops,
    run,
)


class SaysCuda(nn.Module):
    """Code that was written for one GPU and says so everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert torch.cuda.is_available()
        x = x.cuda()
        assert x.is_cuda
        noise = torch.randn(x.shape, device="cuda")
        zeros = torch.zeros(3, device=torch.device("cuda:0"))
        moved = torch.ones(3).to("cuda", non_blocking=True)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            hidden = self.linear(x)
            assert hidden.dtype is torch.bfloat16
            with torch.autocast("cuda", enabled=False):
                hidden = self.linear(x.float())
                assert hidden.dtype is torch.float32
        torch.cuda.synchronize()
        return hidden + noise + zeros.sum() + moved.sum()


def test_literal_cuda_lands_on_the_virtual_device():
    run(SaysCuda())
    if not torch.cuda.is_initialized():
        assert not torch.accelerator.is_available()


def test_a_loss_can_be_logged_in_the_usual_ways():
    lines = Seen()

    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        value = model(batch).mean()
        lines.append(f"{value.detach():.3f} {value.detach().cpu().numpy()} {value.tolist()}")
        return value

    run(mlp(), loss=loss)
    assert lines[0] == "0.600 0.6000000238418579 0.6"


def test_numbers_on_the_gpu_can_be_made_a_tensor_again():
    seen = Seen()

    def loss(model, batch):
        output = model(batch)
        sides = torch.tensor([4, 5], device=output.device)
        seen.append(torch.tensor([0, sides[0], 2 * sides[1]], device="cuda").tolist())
        seen.append(torch.tensor([3, output.argmax()]).tolist())
        return output.sum()

    run(mlp(), loss=loss)
    assert seen[:2] == [[0, 4, 10], [1, 1]]


def test_a_tensor_says_that_it_is_on_cuda_however_it_is_asked():
    def loss(model, x):
        assert x.device.type == "cuda"
        assert x.is_cuda
        assert x.get_device() == 0
        assert str(x.device) == "cuda:0"
        assert x.device == torch.device("cuda:0") == torch.device("cuda", 0)
        assert torch.device("cuda") != x.device  # as on a GPU
        assert x.cpu().device.type == "cpu"
        assert not x.cpu().is_cuda
        with torch.device("cuda"):
            assert torch.zeros(3).device == x.device
        with torch.autocast(x.device.type, dtype=torch.float16):
            assert model(x).dtype is torch.float16
        return model(x).sum()

    run(mlp(), loss=loss)


def test_backward_sees_cuda_too():
    seen = Seen()

    class Identity(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            seen.append(gradient.device.type)
            return gradient

    run(mlp(), loss=lambda model, x: Identity.apply(model(x)).sum())
    assert set(seen) == {"cuda"}


def test_attention_takes_keywords_only():
    def loss(model, x):
        q = model(x).view(x.shape[0], 1, 8, 8)
        return F.scaled_dot_product_attention(query=q, key=q, value=q, is_causal=True).sum()

    assert any("attention" in op for op in ops(run(mlp(), loss=loss)))


def test_numpy_reads_arrays_of_the_right_shape_from_the_cpu_only():
    seen = Seen()

    def loss(model, x):
        y = model(x)
        cost = torch.cdist(y, y).detach()
        seen.append(np.asarray(cost.cpu()).shape)
        with pytest.raises(TypeError, match="cuda:0 device"):
            np.asarray(cost)
        with pytest.raises(RuntimeError, match="requires grad"):
            y.cpu().numpy()
        return y.sum()

    run(mlp(), loss=loss, n=8)
    assert seen[0] == (8, 8)


def test_streams_and_events_do_nothing():
    def loss(model, x):
        stream, start = torch.cuda.Stream(), torch.cuda.Event(enable_timing=True)
        start.record()
        with torch.cuda.stream(stream):
            y = model(x)
        y.record_stream(stream)
        stream.wait_stream(torch.cuda.current_stream())
        assert start.elapsed_time(start) + 1.0 == 1.0
        return y.sum()

    run(mlp(), loss=loss)


def test_functions_of_pytorch_in_python_find_the_place_where_tensors_are():
    def loss(model, batch):
        assert batch.device == torch.device("cuda", 0)
        return model(batch).mean()

    bags = nn.EmbeddingBag(8, 8)
    autobatch.predict(
        bags, micro_batch=2, sample=torch.zeros(2, 8, dtype=torch.int64), loss=loss, gpu="t4"
    )
