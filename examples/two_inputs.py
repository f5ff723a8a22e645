"""A model of your own with two inputs and your own loss, described by a Workload.

Run it with `python examples/two_inputs.py`, or hand the same function to the command line:

    autobatch probe examples/two_inputs.py:build --target 64 --gpu t4
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autobatch

WORDS, VOCABULARY = 64, 20_000
Batch = dict[str, Tensor]


class Matcher(nn.Module):
    """Embeds pictures and captions into one space."""

    def __init__(self, width: int = 256):
        super().__init__()
        self.picture = nn.Sequential(
            nn.Conv2d(3, 64, 7, stride=4, padding=3), nn.ReLU(),
            nn.Conv2d(64, width, 3, stride=2, padding=1), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        )  # fmt: skip
        self.words = nn.Embedding(VOCABULARY, width)
        self.caption = nn.LSTM(width, width, num_layers=2, batch_first=True)

    def forward(self, pictures: Tensor, captions: Tensor) -> tuple[Tensor, Tensor]:
        output, _ = self.caption(self.words(captions))
        return F.normalize(self.picture(pictures), dim=-1), F.normalize(output[:, -1], dim=-1)


def batch(n: int) -> Batch:
    return {
        "pictures": torch.randn(n, 3, 224, 224),
        "captions": torch.randint(VOCABULARY, (n, WORDS)),
    }


def contrastive_loss(model: nn.Module, inputs: Batch) -> Tensor:
    pictures, captions = model(**inputs)
    scores = pictures @ captions.T / 0.07
    matches = torch.arange(len(scores), device=scores.device)
    return (F.cross_entropy(scores, matches) + F.cross_entropy(scores.T, matches)) / 2


def build() -> autobatch.Workload:
    return autobatch.Workload(model=Matcher(), batch=batch, loss=contrastive_loss, autocast="fp16")


if __name__ == "__main__":
    print(autobatch.tune(build(), target=64, gpu="t4"))
