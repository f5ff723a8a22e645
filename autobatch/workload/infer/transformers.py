"""Inputs of transformers' models, tried in dry runs where they are not certain."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from autobatch.workload.infer.arguments import Arguments
from autobatch.workload.infer.dry_run import DryRun, Refused
from autobatch.workload.infer.fields import SURROGATE, Field, Inferred, builder, describe, unknown
from autobatch.workload.infer.labels import LM_HEAD
from autobatch.workload.infer.sizes import Sizes

__all__ = ["infer_transformers"]

LABELS = re.compile(r"labels$|^(start|end)_positions$|^next_sentence_label$|^return_loss$")

# How many sizes may differ from those of the config at the same time.
MOST_CHANGES = 2


def infer_transformers(model: Any, seq: int | None, image_size: int | None) -> Inferred:
    """Return the arguments that training needs, and those that the model's errors ask for.

    Raises:
        SampleError: the model runs on none of the sizes that are tried.
    """
    name = type(model).__name__
    arguments = Arguments(model, seq, image_size)
    fields: Mapping[str, Field | bool] = arguments.usual(arguments.sizes)
    # The inputs of an LM head are certain, and trying them costs a second on a large model.
    if not (LM_HEAD.search(name) and arguments.main_inputs == ("input_ids",)):
        fields = _accepted(model, arguments)
    labels = ", ".join(sorted(key for key in fields if LABELS.search(key)))
    return Inferred(
        batch=builder(fields),
        inputs_note=f"inputs inferred: {describe(fields)} from the config of {name}",
        loss_note=f"loss inferred: output.loss of {name} given {labels}" if labels else SURROGATE,
    )


def _accepted(model: nn.Module, arguments: Arguments) -> dict[str, Field | bool]:
    """Return arguments on which a model runs, with those that its own errors ask for.

    One size is changed at a time. Where no change is enough, the one with which the model gets
    furthest is kept, and the others are tried on top of it.

    Raises:
        SampleError: the model runs on none of the sizes that are tried.
    """
    dry_run, why = DryRun(model), ""
    base, furthest = arguments.sizes, -1
    for _ in range(MOST_CHANGES + 1):
        best = base
        for sizes in arguments.variants(base):
            fields, refused = _completed(dry_run, arguments, sizes)
            if refused is None:
                return fields
            why = why or refused.why
            if refused.calls > furthest:
                best, furthest = sizes, refused.calls
        if best == base:
            break
        base = best
    raise unknown(model, why)


def _completed(
    dry_run: DryRun, arguments: Arguments, sizes: Sizes
) -> tuple[dict[str, Field | bool], Refused | None]:
    """Add what errors ask for until a model runs, or asks for nothing more."""
    fields = arguments.usual(sizes)
    while isinstance(refused := dry_run.run(fields), Refused):
        more = arguments.asked_for(refused.error, fields, sizes)
        if not more:
            return fields, refused
        fields |= more
    return fields, None
