"""The models that are compared, built on the CPU with weights that nobody drew.

Models have no convolutions beyond one that embeds patches, because the bench does not know what
cuDNN takes. Those of transformers have a few layers of their published widths.

Invariant: nothing is downloaded, and a name builds the same model in every process.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from autobatch.errors import SampleError
from autobatch.workload.complete import Asked
from autobatch.workload.workload import Workload
from reports.common.configs import STATED
from reports.common.heads import heads_of
from reports.common.shrink import Level, merged, shrink
from reports.fidelity.recurrent import RECURRENT

LARGEST_PARAMETERS = 350_000_000
_LEVELS = (
    Level(layers=True),
    Level(layers=True, positions=True, vocabulary=True),
    Level(layers=True, positions=True, vocabulary=True, widths=True),
    Level(layers=True, positions=True, vocabulary=True, widths=True, completed=True),
)
LIBRARIES = ("timm", "transformers", "torchvision", "recurrent")
_WITHOUT_CONVOLUTIONS = """
    beit cait convit deit eva gemma4_vit hiera hieradet_sam2 mlp_mixer naflexvit qwen3_vit
    swin_transformer swin_transformer_v2 swin_transformer_v2_cr tnt vision_transformer
    vision_transformer_relpos vision_transformer_sam
""".split()
"""The modules of timm with models that have no convolution but one; some of theirs have more."""

_TORCHVISION = ("vit_b_16", "vit_b_32", "vit_l_32", "swin_t", "swin_s", "swin_b", "swin_v2_t")


class NotBuiltError(Exception):
    """A name has no model here, or one that is not compared; the message says why."""


def names(libraries: Sequence[str] = ()) -> list[str]:
    """Return the names of all subjects, or of those of some libraries."""
    found = {
        "timm": [f"timm:{name}" for name in _timm_names()],
        "transformers": [f"transformers:{name}" for name in _transformers_types()],
        "torchvision": [f"torchvision:{name}" for name in _TORCHVISION],
        "recurrent": [f"recurrent:{name}" for name in RECURRENT],
    }
    return [name for library in libraries or found for name in found[library]]


def workload(
    name: str, *, device: str = "cpu", checkpointing: bool = False, autocast: str | None = None
) -> Workload:
    """Build a model, and say how it is trained: AdamW, inputs and loss as autobatch infers them.

    Args:
        name: one of `names()`.
        device: "cpu", or "meta" for a model without memory.
        checkpointing: switches the model's own on.
        autocast: as in `autobatch.Workload`.

    Raises:
        NotBuiltError: there is no such model, it is too large, or it has convolutions.
    """
    library, _, model_name = name.partition(":")
    build = {
        "timm": _timm,
        "transformers": _transformers,
        "torchvision": _torchvision,
        "recurrent": lambda name: Asked(model=RECURRENT[name]()),
    }[library]
    with torch.device(device), _Undrawn():
        asked = build(model_name)
    _require_comparable(asked.model)
    for module in asked.model.modules():
        if getattr(module, "layerdrop", 0):  # layers that are skipped are drawn on the card
            module.layerdrop = 0.0
    if checkpointing:
        _checkpoint(asked.model)
    try:
        return replace(asked, autocast=autocast).workload()
    except SampleError as error:
        raise NotBuiltError(str(error)) from error


def _timm_names() -> list[str]:
    logging.getLogger("timm").setLevel(logging.ERROR)
    timm = importlib.import_module("timm")
    return [name for module in _WITHOUT_CONVOLUTIONS for name in timm.list_models(module=module)]


def _transformers_types() -> list[str]:
    home = importlib.import_module("transformers.models.auto.configuration_auto")
    return list(home.CONFIG_MAPPING_NAMES)


def _timm(name: str) -> Asked:
    timm = importlib.import_module("timm")
    return Asked(model=_or_say(partial(timm.create_model, name, pretrained=False)))


def _torchvision(name: str) -> Asked:
    models = importlib.import_module("torchvision.models")
    return Asked(model=_or_say(partial(models.get_model, name)))


def _transformers(kind: str) -> Asked:
    transformers = importlib.import_module("transformers")
    try:
        config_class = transformers.CONFIG_MAPPING[kind]
        fields = merged(config_class().to_dict(), STATED.get(kind, {}))
    except Exception as error:
        raise NotBuiltError(f"its config has no defaults: {error}") from error
    reason = "no Auto class has it"
    for level in _LEVELS:
        try:
            config = config_class.from_dict(shrink(fields, level))
            model = _with_a_head(transformers, config)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            continue
        if model is not None and _size(model) <= LARGEST_PARAMETERS:
            return Asked(model=model)
    raise NotBuiltError(reason)


def _with_a_head(transformers: Any, config: Any) -> nn.Module | None:
    config.architectures = config.architectures or []
    for auto in heads_of(transformers, config):
        with contextlib.suppress(Exception):
            with torch.device("meta"):
                size = _size(auto.from_config(config))
            if size > LARGEST_PARAMETERS:
                return None
            model: nn.Module = auto.from_config(config)
            return model
    return None


def _or_say(build: Callable[[], nn.Module]) -> nn.Module:
    try:
        with torch.device("meta"):
            size = _size(build())
    except Exception as error:
        raise NotBuiltError(f"{type(error).__name__}: {error}") from error
    if size > LARGEST_PARAMETERS:
        raise NotBuiltError(f"{size:,} parameters are too many")
    return build()


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _require_comparable(model: nn.Module) -> None:
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d)
    layers = [layer for layer in model.modules() if isinstance(layer, kinds)]
    if len(layers) > 1:
        raise NotBuiltError(f"it has {len(layers)} convolutions, and the bench knows no cuDNN")


def _checkpoint(model: Any) -> None:
    if getattr(model, "supports_gradient_checkpointing", False):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    elif hasattr(model, "set_grad_checkpointing"):
        model.set_grad_checkpointing(True)
    else:
        raise NotBuiltError("it has no activation checkpointing of its own")


class _Undrawn(TorchFunctionMode):
    """Leaves weights as they are: drawing hundreds of millions of numbers takes most of the time.

    No size depends on a weight.
    """

    _DRAWS = frozenset(
        getattr(torch.Tensor, name)
        for name in "normal_ uniform_ erfinv_ clamp_ trunc_normal_".split()
        if hasattr(torch.Tensor, name)
    )

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Return the tensor that would be filled."""
        if func in self._DRAWS and args[0].numel() > 2**16:
            return args[0]
        return func(*args, **(kwargs or {}))
