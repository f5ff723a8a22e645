"""Fields of the arguments that transformers models take, by their names."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from autobatch.workload.infer.configs import SIGHT, stated, text_configs
from autobatch.workload.infer.documented import evaluated
from autobatch.workload.infer.fields import Field, float_dtype, pair
from autobatch.workload.infer.labels import CHOICES
from autobatch.workload.infer.plain import TOKENS
from autobatch.workload.infer.signature import PATCH_GRID, Signature
from autobatch.workload.infer.sizes import Sizes

__all__ = ["NamedFields"]

CLIP_FRAMES = 16
BYTES = 256
# Side of the grid of patches, where images come as patches in one row: models merge 2 or 3 of a
# side, and all numbers that follow from so few are known on a simulated GPU.
GRID = 12
PLACES = tuple(place for row in range(GRID) for column in range(GRID) for place in (column, row))
PATCH_PAIRS = re.compile(r"spatial_shapes$|pixel_position_ids$|target_sizes$")
# Names of whole numbers that count something, and of sizes in docstrings that are those of a text.
COUNTS = re.compile(r"sizes?$|structure$|lengths?$|counts?$|duration|^num_")
LENGTH = re.compile(r"(length|tokens|seq_len|frames)$")


class NamedFields:
    """Makes the fields of one model's arguments."""

    def __init__(self, model: Any, signature: Signature) -> None:
        """Take what the config and the signature say."""
        self._config, self._name = model.config, type(model).__name__
        self._signature, self._dtype = signature, float_dtype(model)
        self._read, self._written = text_configs(model.config)

    def field(self, name: str, sizes: Sizes) -> Field | None:
        """Return an argument; None for a name that tells nothing."""
        config, tokens = self._config, (sizes.tokens,)
        worked_out = self._documented(name, sizes) if self._is_worked_out(name) else None
        if worked_out is not None:
            return worked_out
        if name.endswith("mask"):
            dtype = torch.bool if name in self._signature.booleans else torch.int64
            return Field(self._masked(name, sizes), dtype, low=1, high=2)
        if name.endswith("input_ids"):
            return self._tokens(name, sizes)
        if name.endswith("token_type_ids"):
            return Field(tokens)
        if name.endswith("bbox"):
            # equal corners: a box of no width is in order, one of negative width is not
            return Field(
                (*tokens, 4), self._dtype if sizes.is_normalised else torch.int64, low=1, high=2
            )
        if name.endswith("pixel_values_videos"):
            return Field((self._clip(), self._channels(), *sizes.image), self._dtype)
        if name.endswith("pixel_values") or (self._signature.is_packed and name == "hidden_states"):
            return self._pixels(sizes)
        if name.endswith("position_ids") and PATCH_GRID.search(name):
            return Field((GRID * GRID, 2), values=PLACES)
        if PATCH_PAIRS.search(name):
            return Field((2,), values=(GRID, GRID))
        if PATCH_GRID.search(name):
            return Field((3,), values=(1, GRID, GRID))
        if name == "merge_sizes":
            return Field((), low=1, high=2)
        if name == "flattened_patches":  # each with its row and column
            height, width = self._patch()
            return Field((GRID * GRID, 2 + self._channels() * height * width), self._dtype)
        if name in ("input_features", "audio_mel"):
            return Field(self._spectrogram(sizes), self._dtype)
        if name == "input_values":
            shape = self._spectrogram(sizes) if sizes.wave is None else (*sizes.wave, sizes.samples)
            return Field(shape, self._dtype)
        if name == "past_values_padding":
            return Field(self._series("past_values"))
        if name.startswith(("past_", "future_")) and name.endswith(("_values", "_features")):
            return Field(self._series(name), self._dtype)
        if name.endswith(("hidden_states", "embeds")):
            side = "encoder_hidden_size" if name.startswith("encoder") else "hidden_size"
            width = stated(config, side, "hidden_size", "d_model")
            return Field((*tokens, width), self._dtype) if width else None
        return self._documented(name, sizes) or self._vectors(name, sizes)

    def _vectors(self, name: str, sizes: Sizes) -> Field | None:
        """Return an argument whose width the config states under the same name."""
        # such as visual_feats of visual_feat_dim numbers each
        width = stated(self._config, f"{name}_dim", f"{name.removesuffix('s')}_dim")
        if width:
            return Field((sizes.tokens, width), self._dtype)
        # one vector, padded to the most there may be, such as the state of a robot
        most = stated(self._config, f"max_{name}_dim")
        return Field((most,), self._dtype) if most else None

    def label_tokens(self, sizes: Sizes) -> Field:
        """Return labels that are tokens."""
        written = stated(self._written, "vocab_size") or stated(self._config, "vocab_size")
        field = self._in_codebooks("labels", sizes)
        if field is not None and not field.shape:  # flattened, and so of any other shape
            field = self._in_codebooks("decoder_input_ids", sizes)
        field = field or Field(self._text_shape(sizes))
        return replace(field, high=written or BYTES)

    def _tokens(self, name: str, sizes: Sizes) -> Field:
        text = self._written if name.startswith("decoder") else self._read
        vocabulary = stated(text, "vocab_size") or stated(self._config, "vocab_size") or BYTES
        lead = (CHOICES,) if "ForMultipleChoice" in self._name else ()
        field = self._in_codebooks(name, sizes) or Field((*lead, *self._text_shape(sizes)))
        return replace(field, high=vocabulary)

    def _in_codebooks(self, name: str, sizes: Sizes) -> Field | None:
        """Return tokens of audio, of which several make a place, where the docstring says so."""
        found = self._signature.documented.get(name)
        several = found and any("codebooks" in size for size in found.sizes)
        return self._documented(name, sizes) if several else None

    def _documented(self, name: str, sizes: Sizes) -> Field | None:
        """Return an argument of the shape that the docstring gives, as far as that is known."""
        found = self._signature.documented.get(name)
        if found is None:
            return None
        # texts without their last token are one shorter than input_ids are
        written = (re.sub(r"length \+ 1$", "length", size) for size in found.sizes)
        rows, *rest = (evaluated(size, self._size_of(name, sizes)) for size in written)
        shape = [size for size in rest if size is not None]
        if len(shape) < len(rest):
            return None
        if sizes.is_column and self._signature.is_vector(name):
            shape = [1]
        value = int(bool(COUNTS.search(name)))  # zero is an index of every table
        dtype = found.dtype or self._dtype
        return Field(tuple(shape), dtype, low=value, high=value + 1, rows=rows or 1)

    def _is_worked_out(self, name: str) -> bool:
        """Say whether the docstring gives the size of a feature as a product."""
        found = self._signature.documented.get(name)
        return found is not None and any("*" in size for size in found.sizes[1:])

    def _size_of(self, name: str, sizes: Sizes) -> Callable[[str], Any]:
        """Return a function that gives the sizes which the docstring of an argument names."""
        height, width = sizes.image
        known = {
            "batch_size": 1,
            "height": height,
            "width": width,
            "image_size": height,
            "num_channels": self._channels(),
            "num_frames": self._clip(),
            "num_patches": math.prod(
                side // patch for side, patch in zip(sizes.image, self._patch(), strict=True)
            ),
            "num_image_tokens": GRID * GRID,
            "num_mel_bins": sizes.bins,
            "dim": stated(self._config, "hidden_size", "d_model"),
            "num_codebooks": stated(self._config, "num_codebooks", "num_channels"),
        }

        length = stated(self._config, f"{name.partition('_')[0]}_seq_len") or sizes.tokens

        def size_of(size: str) -> Any:
            if known.get(size) or LENGTH.search(size):
                return known.get(size, length)
            return stated(self._config, size, f"max_{size}")

        return size_of

    def _text_shape(self, sizes: Sizes) -> tuple[int, ...]:
        return (sizes.tokens, *((sizes.codebooks,) if sizes.codebooks else ()))

    def _masked(self, name: str, sizes: Sizes) -> tuple[int, ...]:
        """Return the shape of a mask by what its name says is masked."""
        if name.startswith(("past_", "future_")):
            return self._series(f"{name.partition('_')[0]}_values")
        if name.startswith("pixel_") and sizes.is_whole:
            return sizes.images
        if name.startswith("pixel_"):
            return (GRID * GRID,) if self._signature.is_packed else sizes.image
        if name.startswith("image_"):
            return (sizes.tokens, *sizes.images)
        is_for_text = name.startswith("decoder") or "input_ids" in self._signature.main_inputs
        if name.endswith("attention_mask") and is_for_text:
            return (sizes.tokens,)
        if "input_values" in self._signature.main_inputs and sizes.wave is not None:
            return (sizes.samples,)
        if {"input_features", "audio_mel"} & set(self._signature.main_inputs):
            return (sizes.frames,)
        return (sizes.tokens,)

    def _channels(self) -> int:
        return stated(self._config, "num_channels", "in_channels", prefer=SIGHT) or 3

    def _clip(self) -> int:
        return stated(self._config, "num_frames", "frames_per_clip", prefer=SIGHT) or CLIP_FRAMES

    def _pixels(self, sizes: Sizes) -> Field:
        """Return images; where a grid says how many patches each has, the patches of all."""
        config, dtype = self._config, self._dtype
        if self._signature.is_packed:
            height, width = self._patch()
            if any(PATCH_PAIRS.search(name) for name in self._signature.accepts):
                return Field((GRID * GRID, self._channels() * height * width), dtype)
            depth = stated(config, "temporal_patch_size", "patch_temporal", prefer=SIGHT) or 1
            patch = (self._channels() * depth, height, width)
            return Field((math.prod(patch),) if sizes.is_folded else patch, dtype, rows=GRID**2)
        if "target_sizes" in self._signature.accepts:  # the patches of all images side by side
            height, width = self._patch()
            shape = (1, self._channels(), height)
            return Field(shape, dtype, batch_dim=3, rows=GRID * GRID * width)
        vision = getattr(config, "vision_config", config)
        frames = stated(vision, "num_frames", nested=False)
        lead = (*((frames,) if frames else ()), *sizes.images)
        return Field((*lead, self._channels(), *sizes.image), dtype)

    def _patch(self) -> tuple[int, int]:
        return pair(stated(self._config, "patch_size", prefer=SIGHT) or 16)

    def _spectrogram(self, sizes: Sizes) -> tuple[int, ...]:
        if sizes.wave is None:  # in place of a waveform
            return (stated(self._config, "max_length") or sizes.frames, sizes.bins)
        shape = (sizes.frames, sizes.bins) if sizes.is_turned else (sizes.bins, sizes.frames)
        return (*sizes.channels, *shape)

    def _series(self, name: str) -> tuple[int, ...]:
        """Return the shape of a time series: its steps, and its channels where they are several."""
        config = self._config
        if name.startswith("future"):
            steps = stated(config, "prediction_length") or 1
        else:
            lags = getattr(config, "lags_sequence", None) or [0]
            steps = (stated(config, "context_length") or TOKENS) + max(lags)
        if name.endswith("_features"):
            return (steps, getattr(config, "num_time_features", 0))
        width = stated(config, "num_input_channels") or stated(config, "input_size") or 1
        has_channels = width > 1 or hasattr(config, "num_input_channels")
        return (steps, width) if has_channels else (steps,)
