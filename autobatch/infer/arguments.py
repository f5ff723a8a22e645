"""The arguments of a transformers model's `forward`, made by name from what its config says."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from autobatch.infer.configs import context_of, stated
from autobatch.infer.fields import Field, float_dtype, pair
from autobatch.infer.labels import CHOICES, labels_of
from autobatch.infer.plain import TOKENS

__all__ = ["Arguments", "Sizes"]

LABEL_TOKENS = 128
IMAGE_SIZE = 224
CLIP_FRAMES = 16
SECONDS_OF_SPEECH = 10
SPEECH_HERTZ = 16_000
FRAMES_OF_SPEECH = 100 * SECONDS_OF_SPEECH
# Tried where a model of transformers does not run at its own size.
LARGER_SIDES = (336, 384, 512, 640, 1024, 1536)
BYTES = 256
# Side of the grid of patches, and its frames, where images come as patches in one row: models merge
# 2 or 3 of a side; on a simulated GPU, the numbers in a tensor are known where all are the same.
GRID = 12

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
BESIDE = re.compile(
    r"(features|padding|pixel|image\w*|mel|pixel_attention)_mask$"
    r"|time_features$|grid_thw$|spatial_shapes$"
)
PATCH_PAIRS = re.compile(r"spatial_shapes$|pixel_position_ids$")
# Feature extractors stack so many frames of a spectrogram in one.
STACKED_FRAMES = (2, 4, 7)
# How configs call the bins of a spectrogram, and nested configs those who see and hear.
MEL_BINS = (
    "num_mel_bins",
    "n_mel_bins",
    "n_mels",
    "mel_dim",
    "num_mel_channels",
    "input_feat_size",
    "input_feat_per_channel",
    "feature_projection_input_dim",
    "input_dim",
)
SIGHT, SOUND = "vision|image|video|backbone|encoder", "audio|speech|encoder"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Sizes of a sample for a transformers model; some are in no config, and are tried.

    Attributes:
        tokens: of a text, and of labels as long as it.
        codebooks: tokens in each place of a sequence; 0 where that is one, without a dimension.
        image: height and width in pixels.
        images: dimensions of several images in a sample.
        is_folded: whether a patch in a row of patches is one dimension.
        frames: of a spectrogram.
        bins: of mel in a frame.
        is_turned: whether the frames come before the bins.
        channels: dimensions before those of a spectrogram.
        wave: dimensions of a waveform without its length; None for a spectrogram in its place.
        is_complete: whether inputs of all modalities are given.
    """

    tokens: int
    image: tuple[int, int]
    frames: int
    bins: int
    codebooks: int = 0
    images: tuple[int, ...] = ()
    is_folded: bool = True
    is_turned: bool = False
    channels: tuple[int, ...] = ()
    wave: tuple[int, ...] | None = ()
    is_complete: bool = False


class Arguments:
    """The arguments of a transformers model's `forward`, made by name from what its config says.

    Attributes:
        sizes: of a sample, as far as the config tells.
        main_inputs: the arguments that hold samples, in the order of `MAIN_INPUTS`.
    """

    def __init__(self, model: Any, seq: int | None, image_size: int | None) -> None:
        """Read the config and the signature."""
        self._model, self._config, self._name = model, model.config, type(model).__name__
        config = self._config
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        self._text, self._dtype = text, float_dtype(model)
        parameters = inspect.signature(model.forward).parameters.values()
        self._accepts = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD]
        self._required = [
            p.name
            for p in parameters
            if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        ]
        self.main_inputs = [name for name in MAIN_INPUTS if name in self._accepts]
        named = model.main_input_name
        known = isinstance(named, str) and named in self._accepts
        self._main = named if known else next(iter(self.main_inputs), None)
        self._is_packed = any(PATCH_GRID.search(name) for name in self._accepts)
        side = stated(config, "image_size", prefer=SIGHT)
        if self._main == "input_ids":
            tokens = context_of(model, text, seq)
        else:
            names = ("max_target_positions", "max_position_embeddings")
            limits = (getattr(text, name, None) for name in names)
            tokens = min(LABEL_TOKENS, *(n for n in limits if isinstance(n, int) and n > 0), TOKENS)
        positions = stated(config, "max_source_positions", prefer=SOUND)
        frames = 2 * positions if positions else None
        self.sizes = Sizes(
            tokens=tokens,
            image=pair(image_size or side or IMAGE_SIZE),
            frames=frames or FRAMES_OF_SPEECH,
            bins=stated(config, *MEL_BINS, prefer=SOUND) or 80,
        )

    def usual(self, sizes: Sizes) -> dict[str, Field | bool]:
        """Return the arguments that training needs: the main input, labels, and those required."""
        names = [self._main] if self._main else []
        if "return_loss" in self._accepts or sizes.is_complete:  # a contrast needs both sides
            names += [name for name in self.main_inputs if name not in names]
        names += [name for name in self._required if name not in names]
        fields = self._made(names, sizes)
        if "return_loss" in self._accepts:
            fields["return_loss"] = True
        if "decoder_input_ids" in self._accepts:
            fields |= self._made(["decoder_input_ids"], sizes)
        if "ForCTC" in self._name and "input_features" in fields:  # it tells the lengths
            fields |= self._made({"attention_mask"}.intersection(self._accepts), sizes)
        labels = labels_of(
            self._name, self._config, self._vocabulary(), self._text_shape(sizes), sizes.image
        )
        return fields | {key: field for key, field in labels.items() if key in self._accepts}

    def variants(self) -> Iterator[Sizes]:
        """Yield the sizes to try: as the config says, then with one thing changed."""
        sizes, main = self.sizes, set(self.main_inputs)
        yield sizes
        if len(main) > 1:
            yield replace(sizes, is_complete=True)
        if self._is_packed:
            yield replace(sizes, is_folded=False)
        elif "pixel_values" in main:
            yield from (replace(sizes, images=(count,)) for count in (1, 2))
        if {"pixel_values", "pixel_values_videos"} & main and not self._is_packed:
            yield from (replace(sizes, image=(side, side)) for side in LARGER_SIDES)
        if {"input_features", "audio_mel"} & main:
            yield replace(sizes, is_turned=True)
            yield replace(sizes, is_turned=True, channels=(1,))
            bins = (128, *(times * sizes.bins for times in STACKED_FRAMES))
            for number in bins:
                yield from (replace(sizes, is_turned=way, bins=number) for way in (False, True))
        if "input_values" in main:
            yield from (replace(sizes, wave=wave) for wave in ((1,), None))
        codebooks = stated(self._config, "num_codebooks")
        if codebooks and "input_ids" in main:
            yield from (replace(sizes, codebooks=codebooks + more) for more in (0, 1))

    def asked_for(
        self, error: Exception | None, given: Mapping[str, Any], sizes: Sizes
    ) -> dict[str, Field | bool]:
        """Return what a model's error says is missing.

        That is what the error names; where only something is None, the other inputs, then what
        goes beside an input, such as its mask.
        Of several names the first is taken, as in "specify either input_ids or inputs_embeds".
        """
        text = f"{type(error).__name__}: {error}"
        words = re.findall(r"\w+", text.lower())
        named = [name for name in self._accepts if name in words and name not in given]
        named.sort(key=words.index)
        fields = self._made(named, sizes)
        if fields:
            is_list = isinstance(error, TypeError) and "missing" in words
            return fields if is_list else dict([next(iter(fields.items()))])
        if "NoneType" not in text:
            return {}
        others = [name for name in self.main_inputs if name not in given]
        beside = [name for name in self._accepts if BESIDE.search(name) and name not in given]
        return self._made(others or beside, sizes)

    def _made(self, names: Iterable[str], sizes: Sizes) -> dict[str, Field | bool]:
        made = {name: self._field(name, sizes) for name in names}
        return {name: field for name, field in made.items() if field is not None}

    def _vocabulary(self) -> int:
        return stated(self._text, "vocab_size") or stated(self._config, "vocab_size") or BYTES

    def _field(self, name: str, sizes: Sizes) -> Field | None:
        """Return an argument; None for a name that tells nothing."""
        config, tokens = self._config, (sizes.tokens,)
        if name.endswith("mask"):
            return Field(self._masked(name, sizes), low=1, high=2)
        if name.endswith("input_ids"):
            lead = (CHOICES,) if "ForMultipleChoice" in self._name else ()
            return Field((*lead, *self._text_shape(sizes)), high=self._vocabulary())
        if name.endswith("token_type_ids"):
            return Field(tokens)
        if name.endswith("bbox"):
            # equal corners: a box of no width is in order, one of negative width is not
            return Field((*tokens, 4), low=1, high=2)
        if name.endswith("pixel_values_videos"):
            return Field((self._clip(), self._channels(), *sizes.image), self._dtype)
        if name.endswith("pixel_values") or (self._is_packed and name == "hidden_states"):
            return self._pixels(sizes)
        if name == "pixel_position_ids":
            return Field((GRID * GRID, 2), high=GRID)
        if PATCH_GRID.search(name):
            return Field((2,) if PATCH_PAIRS.search(name) else (3,), low=GRID, high=GRID + 1)
        if name == "merge_sizes":
            return Field((), low=1, high=2)
        if name == "flattened_patches":  # each with its row and column
            height, width = self._patch()
            return Field((GRID * GRID, 2 + self._channels() * height * width), self._dtype)
        if name in ("input_features", "audio_mel"):
            return Field(self._spectrogram(sizes), self._dtype)
        if name == "input_values":
            length = SECONDS_OF_SPEECH * SPEECH_HERTZ
            shape = self._spectrogram(sizes) if sizes.wave is None else (*sizes.wave, length)
            return Field(shape, self._dtype)
        if name.startswith(("past_", "future_")) and name.endswith(("_values", "_features")):
            return Field(self._series(name), self._dtype)
        if name.endswith(("hidden_states", "embeds")):
            side = "encoder_hidden_size" if name.startswith("encoder") else "hidden_size"
            width = stated(config, side, "hidden_size", "d_model")
        else:  # such as visual_feats of visual_feat_dim numbers each
            width = stated(config, f"{name}_dim", f"{name.removesuffix('s')}_dim")
        return Field((*tokens, width), self._dtype) if width else None

    def _text_shape(self, sizes: Sizes) -> tuple[int, ...]:
        return (sizes.tokens, *((sizes.codebooks,) if sizes.codebooks else ()))

    def _masked(self, name: str, sizes: Sizes) -> tuple[int, ...]:
        """Return the shape of a mask by what its name says is masked."""
        if name.startswith(("past_", "future_")):
            return self._series(f"{name.partition('_')[0]}_values")
        if name.startswith("pixel_"):
            return (GRID * GRID,) if self._is_packed else sizes.image
        if name.startswith("image_"):
            return (sizes.tokens, *sizes.images)
        is_for_text = name.startswith("decoder") or "input_ids" in self.main_inputs
        if name.endswith("attention_mask") and is_for_text:
            return (sizes.tokens,)
        if "input_values" in self.main_inputs and sizes.wave is not None:
            return (SECONDS_OF_SPEECH * SPEECH_HERTZ,)
        if {"input_features", "audio_mel"} & set(self.main_inputs):
            return (sizes.frames,)
        return (sizes.tokens,)

    def _channels(self) -> int:
        return stated(self._config, "num_channels", "in_channels", prefer=SIGHT) or 3

    def _clip(self) -> int:
        return stated(self._config, "num_frames", "frames_per_clip", prefer=SIGHT) or CLIP_FRAMES

    def _pixels(self, sizes: Sizes) -> Field:
        """Return images; where a grid says how many patches each has, the patches of all."""
        config, dtype = self._config, self._dtype
        if self._is_packed:
            height, width = self._patch()
            if any(PATCH_PAIRS.search(name) for name in self._accepts):
                return Field((GRID * GRID, self._channels() * height * width), dtype)
            depth = stated(config, "temporal_patch_size", "patch_temporal", prefer=SIGHT) or 1
            patch = (self._channels() * depth, height, width)
            return Field((math.prod(patch),) if sizes.is_folded else patch, dtype, rows=GRID**3)
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
