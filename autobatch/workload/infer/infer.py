"""A model's inputs and loss, found from what the model says about itself.

Invariant: the model is read, never run, moved or changed. What it states is believed; what is
guessed is tried in a dry run first, which takes no memory whatever the model's size. Where nothing
runs, an error says which argument to pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from autobatch.workload.infer.example import infer_example
from autobatch.workload.infer.fields import Inferred, unknown
from autobatch.workload.infer.plain import infer_plain
from autobatch.workload.infer.timm import infer_timm, pretrained_cfg
from autobatch.workload.infer.torchvision import infer_torchvision
from autobatch.workload.infer.transformers import infer_transformers
from autobatch.workload.wrappers import unwrapped

__all__ = ["infer"]


def infer(model: nn.Module, *, seq: int | None = None, image_size: int | None = None) -> Inferred:
    """Infer a model's inputs and training loss from what it says about itself.

    Hugging Face models, also with adapters of peft: from `config`, the signature and the docstring
    of `forward`, and from what its errors ask for. The sequence is as long as the positions allow,
    at most 1,024 tokens (512 where there is no limit); speech lasts 10 s.
    timm: from `pretrained_cfg`. torchvision: from the module path. Lightning: from
    `example_input_array`, with the loss of `training_step` where that accepts the example as a
    whole batch. Anything else: from the first Linear, Embedding, convolution, attention or
    recurrent layer (sequences of 128), kept only if a dry run succeeds.

    Args:
        model: any module, on any device; neither changed nor run.
        seq: tokens in a sequence, instead of those above.
        image_size: side of an image in pixels, instead of the model's own.

    Raises:
        SampleError: no inputs were found on which the model runs.

    >>> inferred = infer(nn.Sequential(nn.Linear(20, 50), nn.ReLU(), nn.Linear(50, 3)))
    >>> inferred.batch(4).shape
    torch.Size([4, 20])
    >>> inferred.inputs_note
    'inputs inferred: float32 [n, 20] from the first layer (Linear)'
    """
    inner = _adapted(unwrapped(model))
    if any(nn.parameter.is_lazy(parameter) for parameter in inner.parameters()):
        raise unknown(inner, "it has lazy parameters: run one batch through it first")
    if hasattr(inner, "config") and hasattr(inner, "main_input_name"):
        return infer_transformers(inner, seq, image_size)
    if hasattr(inner, "config") and isinstance(getattr(inner, "dummy_inputs", None), Mapping):
        return infer_example(inner, "dummy_inputs")
    if "input_size" in pretrained_cfg(inner):
        return infer_timm(inner, image_size)
    if type(inner).__module__.startswith("torchvision.models"):
        return infer_torchvision(inner, image_size)
    if getattr(inner, "example_input_array", None) is not None:
        return infer_example(inner, "example_input_array")
    return infer_plain(inner, seq, image_size)


def _adapted(model: Any) -> Any:
    """Return the model that peft's adapters are in, as it knows what its inputs are."""
    is_adapted = hasattr(model, "peft_config") and hasattr(model, "get_base_model")
    return model.get_base_model() if is_adapted else model
