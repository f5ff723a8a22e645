"""Number formats: autocast, the format of the weights, and of matrix products."""

from __future__ import annotations

from autobatch.levers.lever import Lever, Option
from autobatch.levers.setup import Setup

__all__ = ["PRECISION"]


def _options(setup: Setup) -> list[Option]:
    workload = setup.workload
    if workload.autocast is not None or workload.window is not None:
        return []
    return [
        Option(
            lever="precision",
            value="bf16 autocast",
            what="Matrix products and convolutions run in bfloat16, weights stay in float32.",
            code='with torch.autocast("cuda", torch.bfloat16):  # around forward and loss',
            trainer="bf16=True",
            changes_numerics=True,
            apply=lambda setup: setup.having(autocast="bf16"),
        )
    ]


PRECISION = Lever(
    name="precision",
    what="Compute or keep numbers in formats of fewer bytes.",
    options=_options,
)
