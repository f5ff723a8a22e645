"""Sizes of a sample for a transformers model: as its config states them, else the usual ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from autobatch.workload.infer.configs import AUDIO, VISION, context_of, stated, text_configs
from autobatch.workload.infer.fields import pair

__all__ = ["ALIGNED_FRAMES", "LARGER_SIDES", "STACKED_FRAMES", "WHOLE_WAVE", "Sizes", "sizes_of"]

TOKENS = 128
IMAGE_SIZE = 224
SECONDS_OF_SPEECH = 10
SPEECH_HERTZ = 16_000
FRAMES_OF_SPEECH = 100 * SECONDS_OF_SPEECH
# Sides of images, tried where a model does not run at the size of its config.
LARGER_SIDES = (336, 384, 448, 512, 640, 1024, 1536)
# Frames of a spectrogram that feature extractors stack into one.
STACKED_FRAMES = (2, 4, 7)
# Audio frames per text token in models that take both.
ALIGNED_FRAMES = (2, 4, 8)
# Samples of a waveform that most chunk lengths of models divide: 12 s.
WHOLE_WAVE = 192_000
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
        tokens = context_of(model, text, seq)
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
