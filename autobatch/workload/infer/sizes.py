"""Sizes of a sample for a transformers model: as its config states them, else the usual ones."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from autobatch.errors import SampleError
from autobatch.workload.infer.fields import pair
from autobatch.workload.infer.plain import TOKENS, position_tables

__all__ = ["VISION", "Sizes", "sizes_of", "stated", "text_configs"]

IMAGE_SIZE = 224
SECONDS_OF_SPEECH = 10
SPEECH_HERTZ = 16_000
FRAMES_OF_SPEECH = 100 * SECONDS_OF_SPEECH
LONGEST_CONTEXT = 1024
CONTEXT_WITHOUT_LIMIT = 512
# Names of nested vision and audio configs.
VISION, AUDIO = "vision|image|video|backbone|encoder", "audio|speech|encoder"
# Names of the field that states the mel bins of a spectrogram.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Sizes of a sample for a transformers model; those that no config states are tried.

    Attributes:
        tokens: length of a text, and of labels that are as long.
        codebooks: dimensions after that of a text, where each position has several audio tokens.
        image: height and width in pixels.
        images: dimensions before those of an image, where a sample has several images.
        has_image_mask: whether a pixel mask says which images exist, not which pixels.
        has_flat_patches: whether each patch of a packed image is a vector.
        frames: length of a spectrogram.
        bins: mel bins of each frame.
        has_frames_first: whether frames come before bins.
        channels: dimensions before those of a spectrogram.
        wave: dimensions before the length of a waveform; None where a spectrogram replaces it.
        samples: length of a waveform.
        has_all_modalities: whether inputs of all modalities are given.
        has_relative_boxes: whether corners of boxes are fractions of the page, not whole numbers.
        has_column: whether what the docstring calls one number a sample is a column of them.
    """

    tokens: int
    image: tuple[int, int]
    frames: int
    bins: int
    codebooks: tuple[int, ...] = ()
    images: tuple[int, ...] = ()
    has_image_mask: bool = False
    has_flat_patches: bool = True
    has_frames_first: bool = False
    channels: tuple[int, ...] = ()
    wave: tuple[int, ...] | None = ()
    samples: int = SECONDS_OF_SPEECH * SPEECH_HERTZ
    has_all_modalities: bool = False
    has_relative_boxes: bool = False
    has_column: bool = False


def sizes_of(model: Any, main: str | None, seq: int | None, image_size: int | None) -> Sizes:
    """Return the sizes of a sample as the config states them, and the usual ones of the others.

    Raises:
        SampleError: the sequence asked for is longer than a table of positions.
    """
    config = model.config
    text, _ = text_configs(config)
    if main == "input_ids":
        tokens = _context_of(model, text, seq)
    else:
        names = ("max_target_positions", "max_position_embeddings")
        limits = (getattr(text, name, None) for name in names)
        tokens = min([TOKENS, *(n for n in limits if isinstance(n, int) and n > 0)])
    side = stated(config, "image_size", "max_img_size", prefer=VISION)
    positions = stated(config, "max_source_positions", prefer=AUDIO)
    frames = 2 * positions if positions else None
    return Sizes(
        tokens=tokens,
        image=pair(image_size or side or IMAGE_SIZE),
        frames=frames or FRAMES_OF_SPEECH,
        bins=stated(config, *MEL_BINS, prefer=AUDIO) or 80,
    )


def stated(config: Any, *names: str, prefer: str = "", nested: bool = True) -> Any:
    """Return the first of these sizes that a config or one nested in it states; None if none does.

    Args:
        config: is asked first, then the configs nested in it, depth first.
        names: the fields that may hold the size, the likeliest first.
        prefer: a pattern; nested configs whose name matches are asked before the others.
        nested: whether nested configs are asked at all.
    """
    for name in names:
        value = getattr(config, name, None)
        if value and not isinstance(value, (bool, str)):
            return value
    parts = {key: part for key, part in vars(config).items() if hasattr(part, "to_dict")}
    for key in sorted(parts, key=lambda key: not re.search(prefer, key)):
        value = stated(parts[key], *names, prefer=prefer) if nested else None
        if value:
            return value
    return None


def text_configs(config: Any) -> tuple[Any, Any]:
    """Return the configs of the text that a model reads and of the text that it writes.

    Most models have one config for both.
    """
    if not hasattr(config, "get_text_config"):
        return config, config
    try:
        text = config.get_text_config()
    except ValueError:  # it has one of each
        return config.get_text_config(encoder=True), config.get_text_config(decoder=True)
    return text, text


def _context_of(model: Any, text: Any, seq: int | None) -> int:
    """Return the length of a sequence: the one asked for, else what the positions allow, capped.

    A table of positions that skips a padding index (RoBERTa's) holds fewer than the config says.

    Raises:
        SampleError: the length asked for exceeds a table of positions.
    """
    limit = getattr(text, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 1:
        return seq or CONTEXT_WITHOUT_LIMIT
    learned = False
    usable = limit
    for table in position_tables(model):
        if limit <= table.num_embeddings <= limit + 2:
            learned = True
            if table.padding_idx is not None:
                usable = min(usable, table.num_embeddings - table.padding_idx - 1)
    if learned and seq and seq > usable:
        raise SampleError(
            f"seq={seq} is longer than the {usable} positions of {type(model).__name__}: use a "
            f"shorter one, or build the model with max_position_embeddings={seq + limit - usable}"
        )
    return seq or min(usable, LONGEST_CONTEXT)
