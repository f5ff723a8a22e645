"""Inputs of transformers' models, tried on a fake copy where they are not certain."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from autobatch.infer.arguments import Arguments
from autobatch.infer.fields import SURROGATE, Field, Inferred, builder, describe, unknown
from autobatch.infer.labels import LM_HEAD
from autobatch.infer.trial import Refused, Trial

__all__ = ["infer_transformers"]

LABELS = frozenset(
    {"labels", "start_positions", "end_positions", "next_sentence_label", "return_loss"}
)


def infer_transformers(model: Any, seq: int | None, image_size: int | None) -> Inferred:
    """Return the arguments that training needs, and those that the model's errors ask for.

    Raises:
        SampleError: the model runs on none of the sizes that are tried.
    """
    name = type(model).__name__
    arguments = Arguments(model, seq, image_size)
    fields: Mapping[str, Field | bool] = arguments.usual(arguments.sizes)
    # The inputs of an LM head are certain, and trying them costs a second on a large model.
    if not (LM_HEAD.search(name) and arguments.main_inputs == ["input_ids"]):
        fields = _accepted(model, arguments)
    labels = ", ".join(sorted(LABELS.intersection(fields)))
    return Inferred(
        batch=builder(fields),
        loss=None,
        note=f"inputs inferred: {describe(fields)} from the config of {name}",
        loss_note=f"loss inferred: output.loss of {name} given {labels}" if labels else SURROGATE,
    )


def _accepted(model: nn.Module, arguments: Arguments) -> dict[str, Field | bool]:
    """Return arguments that a model runs on, with those that its own errors ask for.

    Raises:
        SampleError: it runs on none of the sizes that are tried.
    """
    trial, why = Trial(model), ""
    for sizes in arguments.variants():
        fields = arguments.usual(sizes)
        while True:
            try:
                trial.run(fields)
                return fields
            except Refused as refused:
                why = why or str(refused)
                more = arguments.asked_for(refused.error, fields, sizes)
            if not more:
                break
            fields |= more
    raise unknown(model, why)
