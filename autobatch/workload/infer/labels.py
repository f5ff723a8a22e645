"""Labels of transformers models, told by the name of the model's class."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import torch

from autobatch.workload.infer.fields import Field

__all__ = ["CHOICES", "LM_HEAD", "labels_of"]

# Answers of a multiple-choice question.
CHOICES = 4

LM_HEAD = re.compile(r"ForCausalLM|LMHead|ForMaskedLM|ForConditionalGeneration")


def labels_of(name: str, config: Any, tokens: Field, size: tuple[int, int]) -> dict[str, Field]:
    """Return the labels that a model's head is trained on; none for a model without a head.

    Args:
        name: the name of the model's class.
        config: the model's config.
        tokens: labels that are tokens, one for each position of a text.
        size: height and width of an image.
    """
    classes = max(getattr(config, "num_labels", 1), 1)
    if LM_HEAD.search(name):
        return {"labels": tokens}
    if re.search(r"For(Sequence|Image|Audio|Video)Classification", name):
        if getattr(config, "problem_type", None) == "multi_label_classification":
            return {"labels": Field((classes,), torch.float32)}
        if classes == 1:
            return {"labels": Field((), torch.float32)}
        return {"labels": Field((), high=classes)}
    if "ForTokenClassification" in name:
        return {"labels": replace(tokens, high=classes)}
    if "ForQuestionAnswering" in name:
        return {
            key: Field((), high=tokens.shape[0]) for key in ("start_positions", "end_positions")
        }
    if "ForMultipleChoice" in name:
        return {"labels": Field((), high=CHOICES)}
    if "ForNextSentencePrediction" in name:
        return {"labels": Field((), high=2)}
    if "ForPreTraining" in name:
        high = 2 if "Electra" in name else tokens.high
        return {"labels": replace(tokens, high=high), "next_sentence_label": Field((), high=2)}
    if "ForSemanticSegmentation" in name:
        return {"labels": Field(size, high=classes)}
    if "ForCTC" in name:
        # Token 0 is the blank, which no transcript holds.
        return {"labels": replace(tokens, low=1)}
    return {}
