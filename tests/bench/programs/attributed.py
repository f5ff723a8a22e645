"""What holds the peak of several models, as the plan of the card and a simulated one say."""

from __future__ import annotations

from collections import Counter
from math import prod
from typing import Any

from torch import nn

import autobatch
from autobatch import Plan
from tests.bench.programs import tell
from tests.tuning.test_attribution_of_plans import kinds

TARGET = 8


def held(plan: Plan) -> Counter[tuple[object, ...]]:
    """Bytes at the peak by what a report calls them; libraries' workspaces are named otherwise."""
    found: Counter[tuple[object, ...]] = Counter()
    for blocks in plan.peak_blocks:
        each = blocks.holder
        if each.category != "workspace":
            elements = prod(each.shape) if each.dtype else 0  # kernels make some, and turn them
            shown = each.module, each.op, each.phase, elements, each.dtype, each.where
            found[shown] += blocks.size_bytes
    return found


def compared(model: nn.Module, sample: Any, options: dict[str, Any]) -> dict[str, object]:
    asked = {"target": TARGET, "sample": sample, "cache": False, **options}
    measured = autobatch.tune(model, **asked)
    simulated = autobatch.tune(model, gpu="t4", **asked)
    here, there = held(measured), held(simulated)
    names = {name for name, _ in model.named_modules()}
    return {
        "evidence": measured.footprint.evidence,
        "bytes": here.total(),
        "lines": sorted({where for *_, where in here if where}),
        "only simulated": [*(there - here).items()],
        "strange modules": sorted({h.module for h in measured.lives.holders} - names),
    }


if __name__ == "__main__":
    tell(
        {
            name: compared(*make())
            for name, make in kinds()
            if name != "FSDP2"  # which is simulated only
        }
    )
