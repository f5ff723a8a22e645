"""Placeholders follow from each other."""

from __future__ import annotations

import torch

from tests.support.seen import Seen
from tests.support.simulated import (
    mlp,
    run,
)


def test_the_additive_form_of_a_mask_of_ones_hides_nothing_and_marks_nothing():
    seen = Seen()

    def loss(model, batch):
        output = model(batch)
        mask = torch.ones(len(batch), 3000, dtype=torch.int64, device=batch.device)
        hidden = 1.0 - mask[:, None, :].float()
        hidden = hidden.masked_fill(hidden.bool(), torch.finfo(torch.float32).min)
        seen.extend([bool((hidden > 0).any()), bool((hidden < 0).any())])
        seen.append(torch.div(7, 2, rounding_mode="trunc").item())
        return output.sum()

    run(mlp(), loss=loss)
    assert seen[:3] == [False, False, 3]
