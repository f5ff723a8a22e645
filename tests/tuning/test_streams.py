"""Batches of many shapes are replayed, and the heaviest item is the one that takes most memory."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn
from torch.utils.data import DataLoader

import autobatch
from autobatch.devices.virtual.gpu import VirtualGpu
from autobatch.gpus.catalogue import CATALOGUE
from autobatch.tuning.streams import Stream
from autobatch.workload.complete import Asked

A100 = CATALOGUE["a100-40gb"]


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(1000, 256)
        self.body = nn.Sequential(nn.Linear(256, 2048), nn.GELU(), nn.Linear(2048, 256))
        self.head = nn.Linear(256, 1000)

    def forward(self, tokens):
        return self.head(self.body(self.embed(tokens)))


def loss(model, tokens):
    return nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())


def padded(texts):
    return nn.utils.rnn.pad_sequence(texts, batch_first=True)


def texts(shortest, longest, step):
    items = [torch.zeros(n, dtype=torch.long) for n in range(shortest, longest + 1, step)] * 16
    return DataLoader(items, batch_size=4, collate_fn=padded)


def tuned(sample, **options):
    options = {"loss": loss, "gpu": A100, "cache": False, "target": 16, **options}
    return autobatch.tune(Tokens(), sample=sample, **options)


def rising(model, optimizer, batches):
    for batch in batches:
        for length in range(64, 513, 64):
            loss(model, batch[:, :length]).backward()
            optimizer.step()
            optimizer.zero_grad()


def test_a_plan_reserves_what_batches_of_growing_length_do():
    plan = tuned(texts(64, 512, 64))
    longest = torch.zeros(2, 512, dtype=torch.long)
    work = autobatch.Workload(model=Tokens(), batch=autobatch.batch_builder(longest), window=rising)
    real = autobatch.predict(work, micro_batch=plan.micro_batch, gpu=A100)
    alone = tuned(longest)
    assert real.peak_reserved_bytes > 1.4 * alone.footprint.peak_reserved_bytes
    assert plan.footprint.peak_reserved_bytes >= real.peak_reserved_bytes
    assert plan.footprint.peak_allocated_bytes == alone.footprint.peak_allocated_bytes
    assert plan.ceiling_footprint.micro_batch == plan.ceiling_at_least


def test_a_plan_says_what_expandable_segments_would_save(monkeypatch):
    plan = tuned(texts(64, 512, 64))
    (said,) = (w for w in plan.warnings if "expandable_segments" in w)
    assert "8 shapes from the data" in said
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    saved = tuned(texts(64, 512, 64))
    assert saved.footprint.peak_reserved_bytes < 0.6 * plan.footprint.peak_reserved_bytes
    assert not any("expandable_segments" in w for w in saved.warnings)


def test_predict_counts_the_stream_too():
    options = {"loss": loss, "gpu": A100, "micro_batch": 16}
    stream = autobatch.predict(Tokens(), sample=texts(64, 512, 64), **options)
    alone = autobatch.predict(Tokens(), sample=torch.zeros(2, 512, dtype=torch.long), **options)
    assert stream.peak_reserved_bytes > 1.4 * alone.peak_reserved_bytes


def test_nothing_is_said_of_items_of_one_shape():
    plan = tuned(texts(512, 512, 1))
    assert not any("shapes" in warning for warning in plan.warnings)


def test_beyond_the_budget_the_cache_is_released_and_the_plan_says_so():
    small = replace(A100, capacity_bytes=A100.context_bytes + 380 * 2**20)
    plan = tuned(texts(64, 512, 64), gpu=small, target=64, headroom=0.0)
    assert plan.footprint.peak_reserved_bytes == plan.budget_bytes
    assert any("stalls the GPU" in warning for warning in plan.warnings)


def test_a_smaller_micro_batch_is_planned_where_the_stream_does_not_fit(monkeypatch):
    monkeypatch.setattr(
        Stream, "fits", lambda stream, budget: stream.run.trace.micro_batch <= 8 and budget > 0
    )
    plan = tuned(texts(64, 512, 64), target=32)
    assert plan.micro_batch == 8 and plan.accumulation_steps == 4
    assert plan.footprint.micro_batch == 8


def test_a_stream_fits_as_long_as_the_cache_can_be_released():
    loader = texts(64, 512, 64)
    workload = Asked(model=Tokens(), sample=loader, loss=loss).workload()
    footprint = autobatch.predict(Tokens(), sample=loader, loss=loss, gpu=A100, micro_batch=16)
    stream = Stream.of(workload, VirtualGpu(A100), footprint)
    assert stream.fits(footprint.peak_reserved_bytes)
    assert stream.fits(footprint.peak_reserved_bytes - 2**20)
    assert not stream.fits(footprint.peak_allocated_bytes - 2**20)


def test_a_shape_that_does_not_run_is_said():
    class Needs128(Tokens):
        def forward(self, tokens):
            return super().forward(tokens) + 0 * tokens[:, 127].sum()

    plan = autobatch.tune(
        Needs128(), sample=texts(64, 512, 64), loss=loss, gpu=A100, target=16, cache=False
    )
    assert any("other shapes of the data are not in the account" in w for w in plan.warnings)


def pages(pictures):
    return DataLoader(pictures, batch_size=2, collate_fn=list)


class Square(nn.Module):
    """Attends over the rows of a picture: costs grow with the square of its height."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, pages):
        rows = [(page * self.weight[:, None, None]).sum(2) for page in pages]
        squares = (row[:, :, None] * row[:, None, :] for row in rows)
        return sum(square.exp().sin().exp().sin().sum() for square in squares)


def test_the_heaviest_item_is_the_one_that_takes_most_memory():
    sizes = (8, 2000), (120, 120), (16, 16)
    mixed = pages([torch.zeros(3, *size) for size in sizes] * 3)
    options = {"gpu": "t4", "target": 8, "cache": False, "loss": lambda model, pages: model(pages)}
    plan = autobatch.tune(Square(), sample=mixed, **options)
    assert any("dataset[4], which takes the most memory" in w for w in plan.notes)
    alone = autobatch.tune(Square(), sample=pages([torch.zeros(3, 120, 120)] * 9), **options)
    assert plan.footprint.activations_bytes == alone.footprint.activations_bytes
