"""Recurrent language models, built with PyTorch's own layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

VOCABULARY = 10_000


class Recurrent(nn.Module):
    """Embedding, recurrent layers, and a projection to the vocabulary."""

    def __init__(self, layer: Callable[..., nn.Module], hidden: int, **options: Any) -> None:
        """Make the layers; `options` are those of the recurrent one."""
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 256)
        self.layers = layer(256, hidden, batch_first=True, **options)
        wide = (options.get("proj_size") or hidden) * (2 if options.get("bidirectional") else 1)
        self.head = nn.Linear(wide, VOCABULARY)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return a score for every token of the vocabulary at every place."""
        scores: Tensor = self.head(self.layers(self.embedding(input_ids))[0])
        return scores


RECURRENT: Mapping[str, Callable[[], nn.Module]] = {
    "lstm": partial(Recurrent, nn.LSTM, 512, num_layers=2, dropout=0.1),
    "lstm-bidirectional": partial(Recurrent, nn.LSTM, 256, bidirectional=True),
    "lstm-projected": partial(Recurrent, nn.LSTM, 512, proj_size=128),
    "gru": partial(Recurrent, nn.GRU, 512, num_layers=2),
    "gru-bidirectional": partial(Recurrent, nn.GRU, 256, num_layers=3, bidirectional=True),
    "rnn": partial(Recurrent, nn.RNN, 512),
}
