"""Sizes of a sample for a transformers model: as its config states them, else the usual ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from autobatch.workload.infer.configs import SIGHT, SOUND, context_of, stated, text_configs
from autobatch.workload.infer.fields import pair

__all__ = ["ALIGNED_FRAMES", "LARGER_SIDES", "STACKED_FRAMES", "WHOLE_WAVE", "Sizes", "sizes_of"]

TOKENS = 128
IMAGE_SIZE = 224
SECONDS_OF_SPEECH = 10
SPEECH_HERTZ = 16_000
FRAMES_OF_SPEECH = 100 * SECONDS_OF_SPEECH
# Tried where a model does not run at its own size.
LARGER_SIDES = (336, 384, 448, 512, 640, 1024, 1536)
# Feature extractors stack so many frames of a spectrogram in one.
STACKED_FRAMES = (2, 4, 7)
# Of speech to a token, where a model hears and writes at once.
ALIGNED_FRAMES = (2, 4, 8)
# Of many parts into which models cut a waveform, a multiple: 12 s.
WHOLE_WAVE = 192_000
# How configs call the bins of a spectrogram.
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
    """Sizes of a sample for a transformers model; some are in no config, and are tried.

    Attributes:
        tokens: of a text, and of labels as long as it.
        codebooks: tokens in each place of a sequence; 0 where that is one, without a dimension.
        image: height and width in pixels.
        images: dimensions of several images in a sample.
        is_whole: whether a mask tells which images there are, not which pixels.
        is_folded: whether a patch in a row of patches is one dimension.
        frames: of a spectrogram.
        bins: of mel in a frame.
        is_turned: whether the frames come before the bins.
        channels: dimensions before those of a spectrogram.
        wave: dimensions of a waveform without its length; None for a spectrogram in its place.
        samples: length of a waveform.
        is_complete: whether inputs of all modalities are given.
        is_normalised: whether corners of boxes are parts of the page, not whole numbers.
        is_column: whether one number of each sample makes a column, where the docstring says row.
    """

    tokens: int
    image: tuple[int, int]
    frames: int
    bins: int
    codebooks: int = 0
    images: tuple[int, ...] = ()
    is_whole: bool = False
    is_folded: bool = True
    is_turned: bool = False
    channels: tuple[int, ...] = ()
    wave: tuple[int, ...] | None = ()
    samples: int = SECONDS_OF_SPEECH * SPEECH_HERTZ
    is_complete: bool = False
    is_normalised: bool = False
    is_column: bool = False


def sizes_of(model: Any, main: str | None, seq: int | None, image_size: int | None) -> Sizes:
    """Return the sizes of a sample, as far as the config tells.

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
        tokens = min(TOKENS, *(n for n in limits if isinstance(n, int) and n > 0), TOKENS)
    side = stated(config, "image_size", "max_img_size", prefer=SIGHT)
    positions = stated(config, "max_source_positions", prefer=SOUND)
    frames = 2 * positions if positions else None
    return Sizes(
        tokens=tokens,
        image=pair(image_size or side or IMAGE_SIZE),
        frames=frames or FRAMES_OF_SPEECH,
        bins=stated(config, *MEL_BINS, prefer=SOUND) or 80,
    )
