"""The arguments that a transformers model is given.

First what training needs; then what the model's own errors ask for, one after another.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from autobatch.workload.infer.fields import Field
from autobatch.workload.infer.labels import labels_of
from autobatch.workload.infer.named import NamedFields
from autobatch.workload.infer.signature import Signature
from autobatch.workload.infer.sizes import Sizes, sizes_of, stated

__all__ = ["Arguments"]

# Arguments that accompany an input, such as its mask.
BESIDE = re.compile(
    r"(features|padding|pixel|image\w*|mel|pixel_attention)_mask$"
    r"|time_features$|grid_thw$|spatial_shapes$|target_sizes$"
)
# Arguments that training seldom gives, even where the docstring tells their shape.
RARELY = re.compile(r"mask|embeds$|labels?$|position_ids$|cache|past_key")
# Sides of images, tried where a model does not run at the size of its config.
LARGER_SIDES = (336, 384, 448, 512, 640, 1024, 1536)
# Frames of a spectrogram that feature extractors stack into one.
STACKED_FRAMES = (2, 4, 7)
# Audio frames per text token in models that take both.
ALIGNED_FRAMES = (2, 4, 8)
# Samples of a waveform that most chunk lengths of models divide: 12 s.
WHOLE_WAVE = 192_000


class Arguments:
    """The arguments of a transformers model's `forward`.

    Attributes:
        sizes: the sizes of a sample, as far as the config tells.
        main_inputs: the arguments that hold samples; the one most often given alone comes first.
    """

    def __init__(self, model: Any, seq: int | None, image_size: int | None) -> None:
        """Read the config and the signature."""
        self._config, self._name = model.config, type(model).__name__
        self._signature = Signature.of(model)
        self._named = NamedFields(model, self._signature)
        self.main_inputs = self._signature.main_inputs
        self._main = self._signature.main
        self.sizes = sizes_of(model, self._main, seq, image_size)
        wave = self._signature.documented.get("input_values")
        if wave is not None and wave.sizes[1:2] == ("1",):
            self.sizes = replace(self.sizes, wave=(1,))

    def usual(self, sizes: Sizes) -> dict[str, Field | bool]:
        """Return the arguments that training needs: main input, required arguments and labels."""
        accepts = self._signature.accepts
        names = [self._main] if self._main else []
        if "return_loss" in accepts or sizes.has_all_modalities:  # a contrastive loss needs both
            names += [name for name in self.main_inputs if name not in names]
        names += [name for name in self._signature.required if name not in names]
        fields = self._made(names, sizes)
        if "return_loss" in accepts:
            fields["return_loss"] = True
        if "decoder_input_ids" in accepts:
            fields |= self._made(["decoder_input_ids"], sizes)
        if "ForCTC" in self._name and "input_features" in fields:  # the mask tells the lengths
            fields |= self._made({"attention_mask"}.intersection(accepts), sizes)
        labels = labels_of(self._name, self._config, self._named.label_tokens(sizes), sizes.image)
        return fields | {key: field for key, field in labels.items() if key in accepts}

    def variants(self, sizes: Sizes) -> Iterator[Sizes]:
        """Yield the given sizes, then copies of them with one thing changed each."""
        main = set(self.main_inputs)
        yield sizes
        if len(main) > 1:
            yield replace(sizes, has_all_modalities=True)
        if self._signature.is_packed:
            yield replace(sizes, has_flat_patches=False)
        elif "pixel_values" in main:
            yield from (replace(sizes, images=(count,)) for count in (1, 2))
            if "pixel_attention_mask" in self._signature.accepts:
                yield replace(sizes, images=(1,), has_image_mask=True)
        if {"pixel_values", "pixel_values_videos"} & main and not self._signature.is_packed:
            yield from (replace(sizes, image=(side, side)) for side in LARGER_SIDES)
            height, width = sizes.image
            if height == 2 * width:  # the model stacks two square images
                yield replace(sizes, image=(width, width))
        if {"input_ids", "input_features"} <= main:  # it aligns audio and text
            yield from (replace(sizes, frames=ratio * sizes.tokens) for ratio in ALIGNED_FRAMES)
        if {"input_features", "audio_mel"} & main:
            yield replace(sizes, has_frames_first=True)
            yield replace(sizes, has_frames_first=True, channels=(1,))
            bins = (128, *(times * sizes.bins for times in STACKED_FRAMES))
            for number, frames_first in itertools.product(bins, (False, True)):
                yield replace(sizes, has_frames_first=frames_first, bins=number)
        if "input_values" in main:
            yield from (replace(sizes, wave=wave) for wave in ((), (1,), None))
            yield replace(sizes, samples=WHOLE_WAVE)
        if "bbox" in self._signature.accepts:
            yield replace(sizes, has_relative_boxes=True)
        if any(self._signature.is_vector(name) for name in self._signature.required):
            yield replace(sizes, has_column=True)
        codebooks = stated(self._config, "num_codebooks")
        if codebooks and "input_ids" in main:
            yield from (replace(sizes, codebooks=(codebooks + more,)) for more in (0, 1))

    def asked_for(
        self, error: Exception | None, given: Mapping[str, Any], sizes: Sizes
    ) -> dict[str, Field | bool]:
        """Return what a model's error says is missing.

        That is what the error names. Where the error only says that something is None, it is the
        other inputs, else what accompanies an input, such as its mask, else what the docstring
        describes. Of several names the first is taken, as in "specify either input_ids or
        inputs_embeds"; of labels all are.
        """
        text = f"{type(error).__name__}: {error}"
        words = re.findall(r"\w+", text.lower())
        missing = [name for name in self._signature.accepts if name not in given]
        named = sorted((name for name in missing if name in words), key=words.index)
        fields = self._made(named, sizes)
        if "labels" in words and not fields:  # no single one is meant
            fields = self._made((name for name in missing if name.endswith("_labels")), sizes)
        if fields:
            is_list = (isinstance(error, TypeError) and "missing" in words) or "labels" in words
            return fields if is_list else dict([next(iter(fields.items()))])
        if "NoneType" not in text:
            return {}
        others = [name for name in self.main_inputs if name not in given]
        beside = [name for name in missing if BESIDE.search(name)]
        documented = self._signature.documented
        rest = [name for name in missing if name in documented and not RARELY.search(name)]
        return self._made(others or beside or rest, sizes)

    def _made(self, names: Iterable[str], sizes: Sizes) -> dict[str, Field | bool]:
        made = {name: self._named.field(name, sizes) for name in names}
        return {name: field for name, field in made.items() if field is not None}
