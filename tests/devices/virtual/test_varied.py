"""Choices and labels are not one number: code that skips what is not there runs in full."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autobatch.tuning.tuner import predict

CLASSES, SIDE, SAMPLES = 7, 32, 4


def per_class(model, batch):
    """A loss over the classes that are in the batch, as Lovász losses and per-class Dice are."""
    x, y = batch
    p = model(x).softmax(1).transpose(0, 1).flatten(1)
    y = y.flatten()
    losses = []
    for c in range(CLASSES):
        mask = (y == c).float()
        if mask.sum() == 0:
            continue
        errors, order = (mask - p[c]).abs().sort(descending=True)
        losses.append(torch.dot(errors, mask[order].cumsum(0)))
    return torch.stack(losses).mean()


def saved_bytes(make):
    """Bytes that a real run on the CPU saves for backward."""
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        make()
    return sum(saved.values())


def test_a_loss_over_the_classes_of_a_batch_saves_what_it_saves_on_the_cpu():
    model = nn.Conv2d(3, CLASSES, 1)
    batch = torch.randn(SAMPLES, 3, SIDE, SIDE), torch.randint(CLASSES, (SAMPLES, SIDE, SIDE))
    real = saved_bytes(lambda: per_class(model, batch))
    plan = predict(model, micro_batch=SAMPLES, sample=batch, loss=per_class, gpu="t4")
    shown = plan.activations_bytes + plan.temporaries_bytes + plan.inputs_bytes
    assert 0.9 * real < shown < 1.5 * real


WIDTH, EXPERTS, CHOSEN = 64, 8, 2


class Experts(nn.Module):
    """Picks rows for each expert, by one of the ways in which eager mixtures do."""

    def __init__(self, picks):
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.ReLU(), nn.Linear(4 * WIDTH, WIDTH))
            for _ in range(EXPERTS)
        )
        self.picks = picks
        self.rows = []

    def forward(self, x):
        weights, chosen = self.router(x).softmax(-1).topk(CHOSEN)
        hot = F.one_hot(chosen, EXPERTS).permute(2, 1, 0)
        output = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            if self.picks == "where":
                rows, slot = torch.where(chosen == e)
            else:
                slot, rows = torch.where(hot[e])
            if rows.numel() == 0:
                continue
            self.rows.append(rows.shape[0])
            output = output.index_add(0, rows, expert(x[rows]) * weights[rows, slot, None])
        return output


@pytest.mark.parametrize("picks", ["where", "one_hot"])
def test_experts_share_the_rows_between_them(picks, capsys):
    def loss(model, x):
        model.rows.clear()
        value = model(x).square().mean()
        print(model.rows)
        return value

    model, x = Experts(picks), torch.randn(512, WIDTH)
    real = saved_bytes(lambda: model(x).square().mean())
    footprint = predict(model, micro_batch=512, sample=x, loss=loss, gpu="t4")
    assert capsys.readouterr().out.splitlines()[-1] == str([512 * CHOSEN // EXPERTS] * EXPERTS)
    assert footprint.activations_bytes < 1.5 * real
