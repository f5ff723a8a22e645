"""Mixtures of experts have a trace model that is right everywhere, and are no quadratic."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autobatch.devices.virtual.gpu import VirtualGpu
from autobatch.gpus.catalogue import GpuSpec
from autobatch.memory.interpolation import nodes_for
from autobatch.memory.trace_model import TraceModel
from autobatch.support.units import GIB
from autobatch.tuning.tuner import predict, tune
from autobatch.workload.sample import batch_builder
from autobatch.workload.workload import Workload

WIDTH = 64
CARD = GpuSpec(name="small", capacity_bytes=GIB)


class Experts(nn.Module):
    """Gives each row to some of its experts, in one of the ways of eager mixtures."""

    def __init__(self, number, chosen, way="where"):
        super().__init__()
        self.chosen, self.way = chosen, way
        self.router = nn.Linear(WIDTH, number)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
            for _ in range(number)
        )

    def forward(self, x):
        weights, picked = self.router(x).softmax(-1).topk(self.chosen, -1)
        out = torch.zeros_like(x)
        if self.way == "where":
            for k, expert in enumerate(self.experts):
                row, column = torch.where(picked == k)
                out.index_add_(0, row, expert(x[row]) * weights[row, column, None])
        elif self.way == "mask":
            for k, expert in enumerate(self.experts):
                mask = (picked == k).any(-1)
                out[mask] = expert(x[mask])
        else:
            counts = F.one_hot(picked.flatten(), len(self.experts)).sum(0).tolist()
            order = picked.flatten().argsort()
            parts = x[order // self.chosen].split(counts)
            made = [expert(part) for expert, part in zip(self.experts, parts, strict=True)]
            out = out.index_add(0, order // self.chosen, torch.cat(made))
        return out


class Tokens(Experts):
    """The same over the tokens of sequences."""

    def forward(self, x):
        return super().forward(x.flatten(0, 1)).view_as(x)


def mean(model, batch):
    return model(batch).mean()


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (Experts(4, 2), ()),
        (Experts(5, 2), ()),
        (Experts(8, 1), ()),
        (Experts(3, 1, "mask"), ()),
        (Experts(3, 1, "split"), ()),
        (Experts(4, 3, "split"), ()),
        (Tokens(6, 2), (5,)),
        (Tokens(4, 2, "split"), (7,)),
    ],
    ids=lambda each: each.way if isinstance(each, Experts) else str(each),
)
def test_a_model_of_few_runs_is_right_at_every_micro_batch(model, shape):
    gpu = VirtualGpu(CARD)
    workload = Workload(model=model, batch=batch_builder(torch.zeros(2, *shape, WIDTH)), loss=mean)

    def trace_at(n):
        return gpu.run(workload, micro_batch=n, accumulation_steps=1).trace

    nodes = nodes_for([trace_at(2), trace_at(3)], 100)
    assert len(nodes) == 3
    fitted = TraceModel.fit([trace_at(n) for n in nodes])
    for n in (nodes[-1] + 1, 30, 31, 64, 1001):
        assert fitted.difference(trace_at(n)) is None


@pytest.mark.parametrize(("number", "chosen"), [(4, 2), (5, 2), (5, 4), (3, 1), (8, 1)])
def test_experts_are_planned_by_a_trace_model_and_not_called_quadratic(number, chosen):
    asked = {"sample": torch.zeros(4, WIDTH), "gpu": CARD, "loss": mean}
    plan = tune(Experts(number, chosen), target=100_003, **asked)
    assert plan.method == "trace model"
    assert plan.executions <= 7
    assert not any("square" in each for each in plan.warnings)
    ran = predict(
        Experts(number, chosen),
        micro_batch=plan.micro_batch,
        accumulation_steps=plan.accumulation_steps,
        **asked,
    )
    assert plan.footprint.peak_reserved_bytes == ran.peak_reserved_bytes
    assert plan.footprint.categories == ran.categories


def test_a_loss_between_all_samples_of_a_batch_is_called_quadratic():
    def contrastive(model, batch):
        z = model(batch)
        return F.cross_entropy(z @ z.T, torch.arange(len(z), device=z.device))

    asked = {"sample": torch.zeros(4, WIDTH), "gpu": CARD, "loss": contrastive}
    for target in (64, 100_003):
        plan = tune(nn.Linear(WIDTH, WIDTH), target=target, **asked)
        assert any("square of the micro-batch" in each for each in plan.warnings)


def test_half_of_a_batch_that_the_code_takes_is_no_quadratic():
    def half(model, batch):
        return model(batch[: len(batch) // 2]).mean()

    model = nn.Sequential(nn.Linear(WIDTH, 16 * WIDTH), nn.GELU(), nn.Linear(16 * WIDTH, WIDTH))
    asked = {"sample": torch.zeros(4, WIDTH), "gpu": CARD, "loss": half}
    plan = tune(model, target=100_003, **asked)
    assert not any("square" in each for each in plan.warnings)
    ran = predict(
        model,
        micro_batch=plan.micro_batch,
        accumulation_steps=plan.accumulation_steps,
        **asked,
    )
    assert plan.footprint.peak_reserved_bytes == ran.peak_reserved_bytes
