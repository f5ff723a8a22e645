"""Code that computes in threads of its own is refused, not simulated in part."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import autobatch
from autobatch.devices.virtual.other_threads import refused_in_other_threads
from autobatch.errors import WorkloadError


class Pooled(nn.Module):
    """Two layers side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with ThreadPoolExecutor(2) as pool:
            first, second = pool.map(lambda layer: layer(x), (self.one, self.other))
        return first + second


class Unnoticed(Pooled):
    """What fails in its thread is not passed on."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        thread = threading.Thread(target=lambda: self.one(x))
        thread.start()
        thread.join()
        return self.other(x)


@pytest.mark.parametrize("kind", [Pooled, Unnoticed])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_ops_in_threads_of_the_users_are_refused(kind: type[nn.Module]) -> None:
    before = vars(FakeTensor)["__torch_dispatch__"]
    with pytest.raises(WorkloadError, match=r"computes in a thread of its own .*tune on a GPU"):
        autobatch.tune(
            kind(),
            target=16,
            gpu="t4",
            sample=torch.randn(2, 8),
            loss=lambda model, x: model(x).square().mean(),
        )
    assert vars(FakeTensor)["__torch_dispatch__"] is before


def test_threads_that_load_data_are_none_of_these() -> None:
    def batch(n: int) -> torch.Tensor:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(lambda: torch.randn(n, 8) + 1).result()

    workload = autobatch.Workload(
        model=nn.Linear(8, 8), batch=batch, loss=lambda model, x: model(x).square().mean()
    )
    assert autobatch.tune(workload, target=16, gpu="t4").micro_batch == 16


def test_a_thread_with_fake_tensors_of_its_own_is_left_alone() -> None:
    fake = FakeTensorMode().from_tensor(torch.zeros(2))
    with ThreadPoolExecutor(1) as pool, refused_in_other_threads():
        assert pool.submit(lambda: (fake + 1).shape).result() == (2,)
