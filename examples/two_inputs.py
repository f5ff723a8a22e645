"""A model of your own with two inputs and a loss of your own, described by a Workload.

Run it with `python examples/two_inputs.py`, or hand the same function to the command line:

    autobatch probe examples/two_inputs.py:build --target 64 --gpu t4
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autobatch

WORDS, VOCABULARY, ANSWERS = 32, 20_000, 1_000
Batch = dict[str, Tensor]


class AnswerQuestions(nn.Module):
    """Looks at a picture, reads a question, and picks one of a thousand answers."""

    def __init__(self, width: int = 256):
        super().__init__()
        sizes = (3, 64, 128, width)
        steps = [
            nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.GroupNorm(32, b), nn.ReLU())
            for a, b in pairwise(sizes)
        ]
        self.eyes = nn.Sequential(*steps, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.words = nn.Embedding(VOCABULARY, width)
        self.reader = nn.LSTM(width, width, num_layers=2, batch_first=True)
        self.answer = nn.Linear(width, ANSWERS)

    def forward(self, pictures: Tensor, questions: Tensor) -> Tensor:
        states, _ = self.reader(self.words(questions))
        return self.answer(self.eyes(pictures) * states[:, -1])


def batch(n: int) -> Batch:
    return {
        "pictures": torch.randn(n, 3, 224, 224),
        "questions": torch.randint(VOCABULARY, (n, WORDS)),
        "votes": torch.rand(n, ANSWERS),
    }


def loss(model: nn.Module, inputs: Batch) -> Tensor:
    scores = model(inputs["pictures"], inputs["questions"])
    return F.binary_cross_entropy_with_logits(scores, inputs["votes"])


def build() -> autobatch.Workload:
    return autobatch.Workload(model=AnswerQuestions(), batch=batch, loss=loss, autocast="fp16")


if __name__ == "__main__":
    print(autobatch.tune(build(), target=64, gpu="t4"))
