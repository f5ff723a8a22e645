"""What the `forward` of a transformers model says of its arguments."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from autobatch.workload.infer.documented import Documented, documented

__all__ = ["Signature", "required_arguments"]

# Arguments that hold samples; the one most often given alone comes first.
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


def required_arguments(forward: Callable[..., Any]) -> tuple[str, ...]:
    """Return the names of a function's arguments that have no default."""
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(forward).parameters.values()
    return tuple(p.name for p in parameters if p.default is p.empty and p.kind not in variadic)


@dataclass(frozen=True, slots=True, kw_only=True)
class Signature:
    """The arguments of a model's `forward`.

    Attributes:
        accepts: the names of all arguments, in order.
        required: the names of those without a default.
        main: the argument that holds the samples: the one that the model states, else the
            likeliest; None where no name tells.
        main_inputs: all arguments that hold samples, in the order of `MAIN_INPUTS`.
        booleans: the arguments that are annotated as truth values.
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
        parameters = inspect.signature(model.forward).parameters.values()
        accepts = tuple(p.name for p in parameters if p.kind is not p.VAR_KEYWORD)
        main_inputs = tuple(name for name in MAIN_INPUTS if name in accepts)
        required = required_arguments(model.forward)
        named = model.main_input_name
        is_accepted = isinstance(named, str) and named in accepts
        likeliest = next(iter(main_inputs), None)
        if is_accepted and main_inputs and named not in (*required, *main_inputs):
            # A stand-in such as `inputs`: of several kinds, an error will ask for the right one.
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
        """Say whether the docstring calls an argument one number for each sample."""
        return name in self.documented and self.documented[name].sizes == ("batch_size",)

    @property
    def is_packed(self) -> bool:
        """Whether all images come as one row of patches, with a grid that says which is whose."""
        return any(PATCH_GRID.search(name) for name in self.accepts)
