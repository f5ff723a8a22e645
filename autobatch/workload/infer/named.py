"""Fields of the arguments that transformers models take, by their names.

Invariant: `FIELDS` alone says what a name means; a name that it does not know is looked up in the
docstring of `forward`, then in the config.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeAlias

import torch

from autobatch.workload.infer.documented import evaluated
from autobatch.workload.infer.fields import Field, float_dtype, pair
from autobatch.workload.infer.labels import CHOICES
from autobatch.workload.infer.plain import TOKENS
from autobatch.workload.infer.signature import Signature
from autobatch.workload.infer.sizes import VISION, Sizes, stated, text_configs

__all__ = ["NamedFields"]

CLIP_FRAMES = 16
# The vocabulary of models that read bytes and state none.
BYTES = 256
# Patches per side of an image, where images come as rows of patches. Models merge patches by 2 or
# 3 per side, which divide 12; numbers computed from so few patches stay known on a simulated GPU.
GRID = 12
# Column and row of every patch.
PLACES = tuple(place for row in range(GRID) for column in range(GRID) for place in (column, row))
PATCH_PAIRS = re.compile(r"spatial_shapes$|pixel_position_ids$|target_sizes$")
# Arguments that are counts: at least 1, where another whole number may be 0.
COUNTS = re.compile(r"sizes?$|structure$|lengths?$|counts?$|duration|^num_")
# Sizes in docstrings that are the length of a text.
LENGTH = re.compile(r"(length|tokens|seq_len|frames)$")


class NamedFields:
    """Makes the fields of one model's arguments."""

    def __init__(self, model: Any, signature: Signature) -> None:
        """Take what the config and the signature say."""
        self._config, self._name = model.config, type(model).__name__
        self._signature, self._dtype = signature, float_dtype(model)
        self._read, self._written = text_configs(model.config)

    def field(self, name: str, sizes: Sizes) -> Field | None:
        """Return an argument; None where neither its name nor the docstring tells its shape."""
        if self._has_product(name) and (field := self._documented(name, sizes)) is not None:
            return field
        made = next(made for pattern, made in FIELDS if re.search(pattern, name))
        return made if isinstance(made, Field) else made(self, name, sizes)

    def label_tokens(self, sizes: Sizes) -> Field:
        """Return labels that are tokens: one for each position of the text that is written."""
        written = stated(self._written, "vocab_size") or stated(self._config, "vocab_size")
        field = self._in_codebooks("labels", sizes)
        if field is not None and not field.shape:  # documented as flat, so any shape will do
            field = self._in_codebooks("decoder_input_ids", sizes)
        field = field or Field((sizes.tokens, *sizes.codebooks))
        return replace(field, high=written or BYTES)

    def _tokens(self, name: str, sizes: Sizes) -> Field:
        text = self._written if name.startswith("decoder") else self._read
        vocabulary = stated(text, "vocab_size") or stated(self._config, "vocab_size") or BYTES
        lead = (CHOICES,) if "ForMultipleChoice" in self._name else ()
        field = self._in_codebooks(name, sizes) or Field((*lead, sizes.tokens, *sizes.codebooks))
        return replace(field, high=vocabulary)

    def _in_codebooks(self, name: str, sizes: Sizes) -> Field | None:
        """Return audio tokens, several of them at each position, where the docstring says so."""
        found = self._signature.documented.get(name)
        several = found and any("codebooks" in size for size in found.sizes)
        return self._documented(name, sizes) if several else None

    def _boxes(self, name: str, sizes: Sizes) -> Field:
        # Equal corners: models accept a box of no width, and refuse one of negative width.
        dtype = self._dtype if sizes.has_relative_boxes else torch.int64
        return Field((sizes.tokens, 4), dtype, low=1, high=2)

    def _mask(self, name: str, sizes: Sizes) -> Field:
        dtype = torch.bool if name in self._signature.booleans else torch.int64
        return Field(self._masked(name, sizes), dtype, low=1, high=2)

    def _masked(self, name: str, sizes: Sizes) -> tuple[int, ...]:
        """Return the shape of a mask by what its name says is masked."""
        if name.startswith(("past_", "future_")):
            return self._series_shape(f"{name.partition('_')[0]}_values")
        if name.startswith("pixel_") and sizes.has_image_mask:
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

    def _video(self, name: str, sizes: Sizes) -> Field:
        return Field((self._frames_of_clip(), self._channels(), *sizes.image), self._dtype)

    def _images(self, name: str, sizes: Sizes) -> Field:
        """Return images; in a packed model, the patches of all images, one after another."""
        dtype = self._dtype
        if self._signature.is_packed:
            height, width = self._patch()
            if any(PATCH_PAIRS.search(each) for each in self._signature.accepts):
                return Field((GRID * GRID, self._channels() * height * width), dtype)
            names = ("temporal_patch_size", "patch_temporal")
            depth = stated(self._config, *names, prefer=VISION) or 1
            patch = (self._channels() * depth, height, width)
            shape = (math.prod(patch),) if sizes.has_flat_patches else patch
            return Field(shape, dtype, rows=GRID * GRID)
        if "target_sizes" in self._signature.accepts:  # the patches of all images side by side
            height, width = self._patch()
            shape = (1, self._channels(), height)
            return Field(shape, dtype, batch_dim=3, rows=GRID * GRID * width)
        vision = getattr(self._config, "vision_config", self._config)
        frames = stated(vision, "num_frames", nested=False)
        lead = (*((frames,) if frames else ()), *sizes.images)
        return Field((*lead, self._channels(), *sizes.image), dtype)

    def _flattened_patches(self, name: str, sizes: Sizes) -> Field:
        height, width = self._patch()
        position = 2  # row and column precede the pixels of a patch
        return Field((GRID * GRID, position + self._channels() * height * width), self._dtype)

    def _channels(self) -> int:
        return stated(self._config, "num_channels", "in_channels", prefer=VISION) or 3

    def _frames_of_clip(self) -> int:
        names = ("num_frames", "frames_per_clip")
        return stated(self._config, *names, prefer=VISION) or CLIP_FRAMES

    def _patch(self) -> tuple[int, int]:
        return pair(stated(self._config, "patch_size", prefer=VISION) or 16)

    def _wave(self, name: str, sizes: Sizes) -> Field:
        if sizes.wave is None:
            return self._spectrogram(name, sizes)
        return Field((*sizes.wave, sizes.samples), self._dtype)

    def _spectrogram(self, name: str, sizes: Sizes) -> Field:
        if sizes.wave is None:  # it takes the place of a waveform
            frames = stated(self._config, "max_length") or sizes.frames
            return Field((frames, sizes.bins), self._dtype)
        shape = (sizes.bins, sizes.frames)
        if sizes.has_frames_first:
            shape = shape[::-1]
        return Field((*sizes.channels, *shape), self._dtype)

    def _series(self, name: str, sizes: Sizes) -> Field:
        return Field(self._series_shape(name), self._dtype)

    def _series_shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a time series: its steps, and its channels where it has several."""
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

    def _hidden_states(self, name: str, sizes: Sizes) -> Field | None:
        if name == "hidden_states" and self._signature.is_packed:
            return self._images(name, sizes)
        own = "encoder_hidden_size" if name.startswith("encoder") else "hidden_size"
        width = stated(self._config, own, "hidden_size", "d_model")
        return Field((sizes.tokens, width), self._dtype) if width else None

    def _described(self, name: str, sizes: Sizes) -> Field | None:
        """Return an argument by its docstring, else by a size that the config names after it."""
        field = self._documented(name, sizes)
        if field is not None:
            return field
        # One vector for each token, as visual_feat_dim tells of visual_feats.
        width = stated(self._config, f"{name}_dim", f"{name.removesuffix('s')}_dim")
        if width:
            return Field((sizes.tokens, width), self._dtype)
        # One vector, padded to the longest allowed, such as the state of a robot.
        most = stated(self._config, f"max_{name}_dim")
        return Field((most,), self._dtype) if most else None

    def _has_product(self, name: str) -> bool:
        """Say whether the docstring gives a size as a product: what the name says is then wrong."""
        found = self._signature.documented.get(name)
        return found is not None and any("*" in size for size in found.sizes[1:])

    def _documented(self, name: str, sizes: Sizes) -> Field | None:
        """Return an argument of the shape in the docstring; None where a size of it is unknown."""
        found = self._signature.documented.get(name)
        if found is None:
            return None
        # A text without its last token is documented as one shorter than input_ids are.
        written = (re.sub(r"length \+ 1$", "length", size) for size in found.sizes)
        rows, *rest = (evaluated(size, self._size_of(name, sizes)) for size in written)
        shape = [size for size in rest if size is not None]
        if len(shape) < len(rest):
            return None
        if sizes.has_column and self._signature.is_vector(name):
            shape = [1]
        value = int(bool(COUNTS.search(name)))  # zero is an index of every table
        dtype = found.dtype or self._dtype
        return Field(tuple(shape), dtype, low=value, high=value + 1, rows=rows or 1)

    def _size_of(self, name: str, sizes: Sizes) -> Callable[[str], Any]:
        """Return a function that gives the sizes which the docstring of an argument names."""
        height, width = sizes.image
        known = {
            "batch_size": 1,
            "height": height,
            "width": width,
            "image_size": height,
            "num_channels": self._channels(),
            "num_frames": self._frames_of_clip(),
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


Maker: TypeAlias = Callable[[NamedFields, str, Sizes], Field | None]

# What the name of an argument says that it is; of several patterns, the first holds.
FIELDS: tuple[tuple[str, Field | Maker], ...] = (
    (r"mask$", NamedFields._mask),
    (r"input_ids$", NamedFields._tokens),
    (r"token_type_ids$", lambda _, name, sizes: Field((sizes.tokens,))),
    (r"bbox$", NamedFields._boxes),
    (r"pixel_values_videos$", NamedFields._video),
    (r"pixel_values$", NamedFields._images),
    (r"pixel_position_ids$", Field((GRID * GRID, 2), values=PLACES)),
    (r"(spatial_shapes|target_sizes)$", Field((2,), values=(GRID, GRID))),
    (r"grid_thw$", Field((3,), values=(1, GRID, GRID))),
    (r"^merge_sizes$", Field((), low=1, high=2)),
    (r"^flattened_patches$", NamedFields._flattened_patches),
    (r"^(input_features|audio_mel)$", NamedFields._spectrogram),
    (r"^input_values$", NamedFields._wave),
    (r"^past_values_padding$", lambda fields, *_: Field(fields._series_shape("past_values"))),
    (r"^(past|future)_(.*_)?(values|features)$", NamedFields._series),
    (r"(hidden_states|embeds)$", NamedFields._hidden_states),
    (r"", NamedFields._described),
)
