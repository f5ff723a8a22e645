"""What the `forward` of a transformers model says of its arguments."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from autobatch.workload.infer.documented import Documented, documented

__all__ = ["PATCH_GRID", "Signature"]

# Arguments that hold samples, the likeliest to be fed alone first.
MAIN_INPUTS = (
    "input_ids",
    "pixel_values",
    "pixel_values_videos",
    "input_features",
    "input_values",
    "audio_mel",
    "flattened_patches",
    "past_values",
    "hidden_states",
)
PATCH_GRID = re.compile(r"grid_thw$|spatial_shapes$|pixel_position_ids$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Signature:
    """The arguments of a model's `forward`.

    Attributes:
        accepts: all names, in order.
        required: those without a default.
        main: the argument that holds the samples, as the model states it; else the likeliest; None
            where no name tells.
        main_inputs: all arguments that hold samples, the likeliest to be fed alone first.
        booleans: those that take truth values, by their annotation.
        documented: what the docstring says of tensors, by name.
    """

    accepts: tuple[str, ...]
    required: tuple[str, ...]
    main: str | None
    main_inputs: tuple[str, ...]
    booleans: frozenset[str]
    documented: Mapping[str, Documented]

    @classmethod
    def of(cls, model: Any) -> Signature:
        """Read the signature of a model."""
        variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        parameters = inspect.signature(model.forward).parameters.values()
        accepts = tuple(p.name for p in parameters if p.kind is not p.VAR_KEYWORD)
        main_inputs = tuple(name for name in MAIN_INPUTS if name in accepts)
        required = tuple(
            p.name for p in parameters if p.default is p.empty and p.kind not in variadic
        )
        named = model.main_input_name
        is_accepted = isinstance(named, str) and named in accepts
        likeliest = next(iter(main_inputs), None)
        if is_accepted and main_inputs and named not in (*required, *main_inputs):
            # `inputs` of many kinds: an error asks for one of those, where they are several
            main = likeliest if len(main_inputs) == 1 else None
        else:
            main = named if is_accepted else likeliest
        return cls(
            accepts=accepts,
            required=required,
            main=main,
            main_inputs=main_inputs,
            booleans=frozenset(p.name for p in parameters if "BoolTensor" in str(p.annotation)),
            documented=documented(type(model).forward),
        )

    def is_vector(self, name: str) -> bool:
        """Say whether an argument is one number of each sample, by the docstring."""
        return name in self.documented and self.documented[name].sizes == ("batch_size",)

    @property
    def is_packed(self) -> bool:
        """Whether images come as patches, beside a grid of them."""
        return any(PATCH_GRID.search(name) for name in self.accepts)
