"""Recurrent layers run as one op of cuDNN."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from tests.support.simulated import (
    WIDTH,
    ops,
    run,
)


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], **options):
        super().__init__()
        self.rnn = kind(WIDTH, 32, num_layers=2, **options)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.rnn(x)[0]


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_run_as_one_cudnn_op(kind):
    trace = run(Recurrent(kind, bidirectional=True), sample=torch.zeros(2, 20, WIDTH))
    assert "aten::_cudnn_rnn" in ops(trace)
    assert not any("cell" in op for op in ops(trace))


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(WIDTH, 32, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        lengths = torch.full((x.size(0),), x.size(1))
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, True, enforce_sorted=False)
        padded, _ = nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0], batch_first=True)
        assert padded.shape == (x.size(0), x.size(1), 32)
        return padded


def test_packed_sequences_count_as_full_length():
    assert "aten::_cudnn_rnn" in ops(run(Packed(), sample=torch.zeros(2, 20, WIDTH)))


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(WIDTH, 32, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.rnn(x)[0]


WEIGHTS = (3 * 32 * WIDTH + 3 * 32 * 32 + 2 * 3 * 32) * 4


@pytest.mark.parametrize("autocast", [None, "bf16"])
def test_weights_and_their_gradients_lie_in_one_buffer_each(autocast):
    trace = run(
        Tagger(),
        sample=torch.zeros(2, 20, WIDTH),
        loss=lambda model, batch: model(batch).square().mean(),
        autocast=autocast,
    )
    flat = [b for b in trace.blocks if b.size_bytes == WEIGHTS and b.category == "parameters"]
    assert len(flat) == 1
    made = [b for b in trace.blocks if b.op == "aten::_cudnn_rnn_backward"]
    gradients = {b.size_bytes for b in made if b.size_bytes >= WEIGHTS // 2}
    assert (WEIGHTS if autocast is None else WEIGHTS // 2) in gradients  # cast to fp16, always


def test_samples_before_steps_are_turned_and_copied():
    trace = run(Tagger(), sample=torch.zeros(2, 20, WIDTH), n=8)
    copies = [
        b.size_bytes for b in trace.blocks if b.op == "cudnn scratch" and b.phase == "forward"
    ]
    assert copies == [8 * 20 * WIDTH * 4] * 2  # one in each window


class Flattening(Tagger):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.rnn.flatten_parameters()
        return super().forward(x)


def test_weights_that_forward_flattens_are_copied_into_a_new_buffer_each_time():
    trace = run(Flattening(), sample=torch.zeros(2, 20, WIDTH), steps=2)
    flat = [
        number
        for number, block in enumerate(trace.blocks)
        if block.size_bytes == WEIGHTS and block.category == "parameters"
    ]
    phases = [trace.blocks[number].phase for number in flat]
    assert phases == ["setup", *["forward"] * 4]  # two windows of two micro-batches
    for old, new in pairwise(flat):  # the new buffer is there before the old one goes
        assert trace.events.index(new) < trace.events.index(~old)


def test_layers_of_a_changed_model_are_flattened_on_their_way_to_the_card():
    options = {"sample": torch.zeros(2, 20, WIDTH), "changes": (lambda model: None,)}
    trace = run(Tagger(), **options)
    flat = [b for b in trace.blocks if b.size_bytes == WEIGHTS and b.category == "parameters"]
    assert [b.phase for b in flat] == ["setup"]


class Tied(Flattening):
    def __init__(self) -> None:
        super().__init__()
        self.rnn.bias_hh_l0 = self.rnn.bias_ih_l0


def test_tied_weights_stay_where_they_are():
    trace = run(Tied(), sample=torch.zeros(2, 20, WIDTH))
    assert not any(b.size_bytes == WEIGHTS for b in trace.blocks if b.phase != "backward")
