"""Code that was written for one GPU says "cuda", reads values and logs them."""

from __future__ import annotations

import torch
from torch import nn

from tests.support.seen import Seen
from tests.support.simulated import (
    WIDTH,
    mlp,
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
