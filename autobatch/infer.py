"""What a model takes as input, found without running it on data.

Invariant: the model is read, never run, moved or changed. What a model states about itself is
believed; what is guessed is first tried on a copy with fake weights, which costs no memory
whatever the model's size and device. Where nothing runs, an error shows the missing argument.
"""

from __future__ import annotations

import copy
import inspect
import logging
import math
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)

from autobatch.errors import SampleError
from autobatch.patching import patched
from autobatch.sample import batch_builder
from autobatch.workload import Workload
from autobatch.wrappers import unwrapped

__all__ = ["Inferred", "infer"]

Loss: TypeAlias = Callable[[nn.Module, Any], Tensor]

# Odd and prime, so that a wrong reshape of the batch seldom goes unnoticed.
TRIED_SAMPLES = 7

TOKENS = 128
LONGEST_CONTEXT = 1024
CONTEXT_WITHOUT_LIMIT = 512
LABEL_TOKENS = 128
CHOICES = 4
IMAGE_SIZE = 224
INCEPTION_SIZE = 299
SEGMENTATION_SIZE = 480
CLIP_SIZE = 112
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
# Weight of the auxiliary heads of GoogLeNet and Inception; it changes no memory.
AUXILIARY_WEIGHT = 0.3

# Sizes tried for a plain convolution, the usual ones first; the first that runs is taken.
LENGTHS = ((1024,), (128,), (16_000,), (256,), (512,), (2048,), (100,), (64,), (32,))
SIDES = (224, 32, 28, 64, 96, 128, 256, 299, 512, 384, 84, 48, 16, 8)
IMAGES = tuple((side, side) for side in SIDES)
VOLUMES = ((16, 112, 112), *((side, side, side) for side in (64, 32, 96, 128, 16)))

HEAD_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
SEQUENCE_LAYERS = (nn.RNNBase, nn.MultiheadAttention)
FIRST_LAYERS = (
    *SEQUENCE_LAYERS,
    *HEAD_LAYERS,
    nn.Embedding,
    nn.EmbeddingBag,
    nn.LayerNorm,
    nn.BatchNorm1d,
    nn.BatchNorm2d,
)
POSITIONS = re.compile(r"pos|wpe")
LM_HEAD = re.compile(r"ForCausalLM|LMHead|ForMaskedLM|ForConditionalGeneration")
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
LABELS = frozenset(
    {"labels", "start_positions", "end_positions", "next_sentence_label", "return_loss"}
)
FAKE_TENSORS = "torch._subclasses.fake_tensor"
SURROGATE = "no loss is known, so the sum of the outputs stands in: pass loss=... for the real one"

# Fake tensors have no values to read; the model may well run where these are raised.
CANNOT_TELL = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Inferred:
    """Inputs and loss for a model that came without them.

    Attributes:
        batch: builds one micro-batch of n samples on the CPU, in plain torch operations.
        loss: the loss of the model's usual training; None where the output holds it (`.loss`)
            or nothing better is known than a sum of the outputs.
        note: what the inputs are and how that was found, in one line.
        loss_note: the same of the loss.
    """

    batch: Callable[[int], Any]
    loss: Loss | None
    note: str
    loss_note: str

    def workload(self, model: nn.Module) -> Workload:
        """Return the workload of training `model` on these inputs."""
        notes = tuple(note for note in (self.note, self.loss_note) if note != SURROGATE)
        return Workload(
            model=model, batch=self.batch, loss=self.loss, loss_name="inferred", notes=notes
        )


@dataclass(frozen=True, slots=True)
class Field:
    """A random tensor of a batch: its shape without the batch dimension, and its values.

    Integers lie in [low, high); floating-point values are standard normal.

    Attributes:
        rows: that each sample has in the batch dimension, as where patches of all images follow
            one another.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.int64
    high: int = 1
    low: int = 0
    batch_dim: int = 0
    rows: int = 1

    def make(self, n: int, generator: torch.Generator) -> Tensor:
        shape = (*self.shape[: self.batch_dim], n * self.rows, *self.shape[self.batch_dim :])
        if self.dtype.is_floating_point:
            return torch.randn(shape, dtype=self.dtype, device="cpu", generator=generator)
        if self.high == self.low + 1:  # unlike random numbers, known on a simulated GPU
            return torch.full(shape, self.low, dtype=self.dtype, device="cpu")
        return torch.randint(
            self.low, self.high, shape, dtype=self.dtype, device="cpu", generator=generator
        )

    def __str__(self) -> str:
        sizes = [str(size) for size in self.shape]
        sizes.insert(self.batch_dim, "n" if self.rows == 1 else f"{self.rows} n")
        return f"{str(self.dtype).removeprefix('torch.')} [{', '.join(sizes)}]"


Fields: TypeAlias = "Field | tuple[Field, ...] | Mapping[str, Field | bool]"


def infer(model: nn.Module, *, seq: int | None = None, image_size: int | None = None) -> Inferred:
    """Infer a model's inputs and training loss from what it says about itself.

    Hugging Face models: from `config` and the signature of `forward`, and from what its errors ask
    for; the sequence is as long as the positions allow, at most 1,024 tokens (512 where there is no
    limit), and speech lasts 10 s.
    timm: from `pretrained_cfg`. torchvision: from the module path. Lightning: from
    `example_input_array`, with the loss of `training_step` where that accepts the example as a
    whole batch. Anything else: from the first Linear, Embedding, convolution, attention or
    recurrent layer (sequences of 128), kept only if a copy with fake weights runs on it.

    Args:
        model: any module, on any device; neither changed nor run.
        seq: tokens in a sequence, instead of those above.
        image_size: side of an image in pixels, instead of the model's own.

    Raises:
        SampleError: nothing was found that the model runs on.

    >>> inferred = infer(nn.Sequential(nn.Linear(20, 50), nn.ReLU(), nn.Linear(50, 3)))
    >>> inferred.batch(4).shape
    torch.Size([4, 20])
    >>> inferred.note
    'inputs inferred: float32 [n, 20] from the first layer (Linear)'
    """
    inner = unwrapped(model)
    if any(nn.parameter.is_lazy(parameter) for parameter in inner.parameters()):
        raise _unknown(inner, "it has lazy parameters: run one batch through it first")
    if hasattr(inner, "config") and hasattr(inner, "main_input_name"):
        return _infer_transformers(inner, seq, image_size)
    if hasattr(inner, "config") and isinstance(getattr(inner, "dummy_inputs", None), Mapping):
        return _infer_example(inner, "dummy_inputs")
    if "input_size" in _timm_cfg(inner):
        return _infer_timm(inner, image_size)
    if type(inner).__module__.startswith("torchvision.models"):
        return _infer_torchvision(inner, image_size)
    if getattr(inner, "example_input_array", None) is not None:
        return _infer_example(inner, "example_input_array")
    return _infer_plain(inner, seq, image_size)


def _unknown(model: nn.Module, why: str) -> SampleError:
    return SampleError(
        f"the inputs of {type(model).__name__} cannot be inferred ({why}): pass one batch, such "
        "as sample=torch.randn(8, 3, 224, 224) or sample=(inputs, labels)"
    )


def _builder(fields: Fields) -> Callable[[int], Any]:
    """Return a batch function with its own random numbers, the same for every call."""

    def build(n: int) -> Any:
        generator = torch.Generator().manual_seed(0)
        if isinstance(fields, Field):
            return fields.make(n, generator)
        if isinstance(fields, tuple):
            return tuple(field.make(n, generator) for field in fields)
        return {
            name: field.make(n, generator) if isinstance(field, Field) else field
            for name, field in fields.items()
        }

    return build


def _describe(fields: Fields) -> str:
    if isinstance(fields, Field):
        return str(fields)
    if isinstance(fields, tuple):
        return ", ".join(str(field) for field in fields)
    return ", ".join(f"{name} {field}" for name, field in fields.items())


def _float_dtype(model: nn.Module) -> torch.dtype:
    dtypes = (p.dtype for p in model.parameters() if p.dtype.is_floating_point)
    return next(dtypes, torch.get_default_dtype())


def _pair(size: Any) -> tuple[int, int]:
    height, width = size if isinstance(size, Sequence) else (size, size)
    return int(height), int(width)


def _last_features(module: nn.Module | None) -> int:
    """Return the outputs of the last Linear or convolution inside a head; 0 where it has none."""
    layers = [m for m in (module.modules() if module else ()) if isinstance(m, HEAD_LAYERS)]
    if not layers:
        return 0
    last = layers[-1]
    return last.out_features if isinstance(last, nn.Linear) else last.out_channels


def _fake_copy(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """Copy a module with fake CPU tensors in place of its own; ties between weights are kept."""
    fakes: dict[int, Any] = {}
    for module in model.modules():
        attributes = (value for value in vars(module).values() if isinstance(value, Tensor))
        for tensor in (*module._parameters.values(), *module._buffers.values(), *attributes):
            if tensor is None or id(tensor) in fakes:
                continue
            with mode:
                fake = torch.empty_strided(
                    tensor.size(), tensor.stride(), dtype=tensor.dtype, device="cpu"
                )
            is_parameter = isinstance(tensor, nn.Parameter)
            fakes[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if is_parameter else fake
    return copy.deepcopy(model, fakes)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence warnings of a fake run: those that matter come again in the real one."""
    loggers = [logging.getLogger(name) for name in ("transformers", FAKE_TENSORS)]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


class _Refused(Exception):
    """A model does not run on a batch.

    Attributes:
        error: what it raised instead.
    """

    def __init__(self, why: str, error: Exception | None = None) -> None:
        super().__init__(why)
        self.error = error


class _Trial:
    """A copy of a model with fake weights, on which inputs are tried."""

    def __init__(self, model: nn.Module) -> None:
        """Copy the model.

        Raises:
            SampleError: it cannot be copied.
        """
        self._mode = FakeTensorMode()
        try:
            self._clone = _fake_copy(model, self._mode).train()
        except Exception as error:
            raise _unknown(model, f"it cannot be copied: {_first_line(error)}") from error

    def run(self, fields: Fields) -> Any:
        """Return the fake output; None where fake tensors cannot tell: the model reads values.

        Raises:
            _Refused: the model does not run, or mixes the samples.
        """
        try:
            with self._mode, torch.no_grad(), _quiet(), _uncached():
                output = _call(self._clone, _builder(fields)(TRIED_SAMPLES))
        except CANNOT_TELL:
            return None
        except Exception as error:
            raise _Refused(
                f"on {_describe(fields)} it raises {_first_line(error)}", error
            ) from error
        if not _keeps_samples(output):
            raise _Refused(
                f"on {_describe(fields)} the output {tuple(output.shape)} mixes the samples"
            )
        return output


@contextmanager
def _uncached() -> Iterator[None]:
    """Keep what is computed on fake tensors out of transformers' caches, which outlive a model."""
    home = sys.modules.get("transformers.pytorch_utils")
    if not hasattr(home, "is_torchdynamo_compiling"):
        yield
        return
    with patched(home, is_torchdynamo_compiling=lambda: True):
        yield


def _first_that_runs(model: nn.Module, candidates: Iterable[Fields]) -> tuple[Fields, Any]:
    """Return the first candidate that a fake copy of the model accepts, and its fake output.

    Raises:
        SampleError: the model rejects every candidate.
    """
    why = "no layer tells what it takes"
    trial = _Trial(model)
    for fields in candidates:
        try:
            output = trial.run(fields)
        except _Refused as refused:
            why = str(refused)
            continue
        return fields, output
    raise _unknown(model, why)


def _call(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple) else model(batch)


def _keeps_samples(output: Any) -> bool:
    """Say whether a tensor has one row per sample; `view(-1, 400)` accepts many wrong sizes."""
    scalar = not isinstance(output, Tensor) or output.dim() == 0
    return scalar or TRIED_SAMPLES in output.shape


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:160]}" if text else type(error).__name__


def _cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    """Classify images; auxiliary outputs count as the model's authors trained them."""
    images, labels = batch
    output = model(images)
    if isinstance(output, Mapping):
        main, auxiliary = output["out"], [output["aux"]] if "aux" in output else []
    elif isinstance(output, Tensor):
        main, auxiliary = output, []
    else:
        main, *auxiliary = output
    loss = F.cross_entropy(main, labels)
    for extra in auxiliary:
        if extra is not None:
            loss = loss + AUXILIARY_WEIGHT * F.cross_entropy(extra, labels)
    return loss


def _timm_cfg(model: nn.Module) -> Mapping[str, Any]:
    cfg = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    return cfg if isinstance(cfg, Mapping) else {}


def _infer_timm(model: Any, image_size: int | None) -> Inferred:
    channels, *size = _timm_cfg(model)["input_size"]
    stem = _timm_stem(model)
    if stem is not None and stem.groups == 1:
        # `in_chans` may differ from the config's, and pixels may be folded into channels before
        folds = (m.bs for m in model.modules() if type(m).__name__ == "SpaceToDepth")
        channels = stem.in_channels // next(folds, 1) ** 2
    built_for = getattr(getattr(model, "patch_embed", None), "img_size", None)
    height, width = _pair(image_size or built_for or size)
    images = Field((channels, height, width), _float_dtype(model))

    heads = model.get_classifier() if hasattr(model, "get_classifier") else None
    head = heads[0] if isinstance(heads, (tuple, list)) else heads
    return _classification(
        images, _last_features(head), f"{channels} x {height} x {width} from timm's pretrained_cfg"
    )


def _timm_stem(model: Any) -> nn.Conv2d | None:
    """Return the convolution that sees the images, where the config names one.

    What comes first among the modules may work on other channels: patches folded into them, say.
    """
    named = _timm_cfg(model).get("first_conv")
    try:
        stem = model.get_submodule(named) if isinstance(named, str) else None
    except AttributeError:
        return None
    return stem if isinstance(stem, nn.Conv2d) else None


def _classification(images: Field, classes: int, what: str) -> Inferred:
    dtype = str(images.dtype).removeprefix("torch.")
    note = f"inputs inferred: {dtype} images {what}"
    if classes == 0:
        return Inferred(batch=_builder(images), loss=None, note=note, loss_note=SURROGATE)
    return Inferred(
        batch=_builder((images, Field((), high=classes))),
        loss=_cross_entropy,
        note=note,
        loss_note=f"loss inferred: cross entropy over {classes} classes",
    )


def _infer_torchvision(model: nn.Module, image_size: int | None) -> Inferred:
    module, dtype = type(model).__module__, _float_dtype(model)
    if ".detection" in module or ".optical_flow" in module:
        raise _unknown(model, "it takes more than a batch of images: use a Workload")
    side = image_size or getattr(model, "image_size", None)
    if ".segmentation" in module:
        height, width = _pair(side or SEGMENTATION_SIZE)
        fields = Field((3, height, width), dtype)
        classes = _last_features(getattr(model, "classifier", None))
        return Inferred(
            batch=_builder((fields, Field((height, width), high=max(classes, 1)))),
            loss=_cross_entropy,
            note=f"inputs inferred: images {fields} for a torchvision segmentation model",
            loss_note=f"loss inferred: cross entropy of every pixel over {classes} classes",
        )
    if ".video" in module:
        side = side or (CLIP_SIZE if type(model).__name__ == "VideoResNet" else IMAGE_SIZE)
        shape: tuple[int, ...] = (3, CLIP_FRAMES, *_pair(side))
    else:
        side = side or (INCEPTION_SIZE if type(model).__name__ == "Inception3" else IMAGE_SIZE)
        shape = (3, *_pair(side))
    images, output = _first_that_runs(model, [Field(shape, dtype)])
    assert isinstance(images, Field)
    main = output[0] if isinstance(output, tuple) else output
    classes = main.shape[1] if isinstance(main, Tensor) and main.dim() == 2 else 0
    sizes = " x ".join(str(size) for size in shape)
    return _classification(images, classes, f"{sizes} for a torchvision model")


def _infer_example(model: nn.Module, attribute: str) -> Inferred:
    build = batch_builder(getattr(model, attribute))
    trains = hasattr(model, "training_step") and _trains_on(model, build)
    return Inferred(
        batch=build,
        loss=_training_step if trains else None,
        note=f"inputs inferred: the model's {attribute}",
        loss_note=f"loss inferred: training_step on {attribute}" if trains else SURROGATE,
    )


def _training_step(model: Any, batch: Any) -> Tensor:
    with warnings.catch_warnings():
        # Without a Trainer nothing is logged, and Lightning says so at every call.
        warnings.filterwarnings("ignore", message=r".*self\.log")
        result = model.training_step(batch, 0)
    loss: Tensor = result["loss"] if isinstance(result, Mapping) else result
    return loss


def _trains_on(model: nn.Module, build: Callable[[int], Any]) -> bool:
    """Say whether `training_step` takes such a batch: an example is often the inputs alone."""
    mode = FakeTensorMode()
    try:
        clone = _fake_copy(model, mode).train()
        with mode, torch.no_grad(), _quiet():
            loss = _training_step(clone, build(TRIED_SAMPLES))
    except Exception:
        return False
    return isinstance(loss, Tensor) and loss.dim() == 0


def _infer_plain(model: nn.Module, seq: int | None, image_size: int | None) -> Inferred:
    required = [
        parameter.name
        for parameter in inspect.signature(model.forward).parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    if len(required) > 1:
        raise _unknown(model, f"forward takes {', '.join(required)}")
    first = next((m for m in model.modules() if isinstance(m, FIRST_LAYERS)), None)
    if first is None:
        raise _unknown(model, "no layer tells what it takes")
    fields, _ = _first_that_runs(model, _plain_candidates(model, first, seq, image_size))
    return Inferred(
        batch=_builder(fields),
        loss=None,
        note=f"inputs inferred: {_describe(fields)} from the first layer ({type(first).__name__})",
        loss_note=SURROGATE,
    )


def _plain_candidates(
    model: nn.Module, first: nn.Module, seq: int | None, image_size: int | None
) -> list[Fields]:
    """Return the inputs that a model with such a first layer may take, the likeliest first."""
    dtype = _float_dtype(model)
    layers = [m for m in model.modules() if isinstance(m, SEQUENCE_LAYERS)]
    batch_dim = 1 if any(not layer.batch_first for layer in layers) else 0
    tokens = seq or min(TOKENS, _learned_positions(model))

    def sequence(features: int) -> Field:
        return Field((tokens, features), dtype, batch_dim=batch_dim)

    def spatial(channels: int, sizes: Iterable[tuple[int, ...]]) -> list[Fields]:
        return [Field((channels, *size), dtype) for size in sizes]

    images = ((image_size, image_size),) if image_size else IMAGES
    match first:
        case nn.Embedding() | nn.EmbeddingBag():
            shapes = ((tokens,), (tokens // 2,), (tokens // 4,), ())
            return [
                Field(shape, high=first.num_embeddings, batch_dim=batch_dim if shape else 0)
                for shape in shapes
            ]
        case nn.RNNBase():
            return [sequence(first.input_size)]
        case nn.MultiheadAttention():
            return [sequence(first.embed_dim)]
        case nn.Linear():
            row = Field((first.in_features,), dtype)
            several = sequence(first.in_features)
            # A lone row would pass for a sequence without a batch in these layers.
            return [several] if layers else [row, several]
        case nn.LayerNorm():
            shape = tuple(first.normalized_shape)
            return [Field(shape, dtype), Field((tokens, *shape), dtype, batch_dim=batch_dim)]
        case nn.Conv1d():
            return spatial(first.in_channels, LENGTHS)
        case nn.Conv2d():
            return spatial(first.in_channels, images)
        case nn.Conv3d():
            return spatial(first.in_channels, VOLUMES)
        case nn.BatchNorm1d():
            return [Field((first.num_features,), dtype), *spatial(first.num_features, LENGTHS)]
        case nn.BatchNorm2d():
            return spatial(first.num_features, images)
    return []


def _learned_positions(model: nn.Module) -> int:
    """Return the fewest positions that a table of position embeddings holds."""
    return min(
        (
            module.num_embeddings
            for name, module in model.named_modules()
            if isinstance(module, nn.Embedding) and POSITIONS.search(name.rpartition(".")[2])
        ),
        default=sys.maxsize,
    )


def _infer_transformers(model: Any, seq: int | None, image_size: int | None) -> Inferred:
    name = type(model).__name__
    arguments = _Arguments(model, seq, image_size)
    fields: Mapping[str, Field | bool] = arguments.usual(arguments.sizes)
    # The inputs of an LM head are certain, and trying them costs a second on a large model.
    if not (LM_HEAD.search(name) and arguments.main_inputs == ["input_ids"]):
        fields = _accepted(model, arguments)
    labels = ", ".join(sorted(LABELS.intersection(fields)))
    return Inferred(
        batch=_builder(fields),
        loss=None,
        note=f"inputs inferred: {_describe(fields)} from the config of {name}",
        loss_note=f"loss inferred: output.loss of {name} given {labels}" if labels else SURROGATE,
    )


def _accepted(model: nn.Module, arguments: _Arguments) -> dict[str, Field | bool]:
    """Return arguments that a model runs on, with those that its own errors ask for.

    Raises:
        SampleError: it runs on none of the sizes that are tried.
    """
    trial, why = _Trial(model), ""
    for sizes in arguments.variants():
        fields = arguments.usual(sizes)
        while True:
            try:
                trial.run(fields)
                return fields
            except _Refused as refused:
                why = why or str(refused)
                more = arguments.asked_for(refused.error, fields, sizes)
            if not more:
                break
            fields |= more
    raise _unknown(model, why)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sizes:
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


class _Arguments:
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
        self._text, self._dtype = text, _float_dtype(model)
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
        stated = _stated(config, "image_size", prefer=SIGHT)
        if self._main == "input_ids":
            tokens = _context(model, text, seq)
        else:
            names = ("max_target_positions", "max_position_embeddings")
            limits = (getattr(text, name, None) for name in names)
            tokens = min(LABEL_TOKENS, *(n for n in limits if isinstance(n, int) and n > 0), TOKENS)
        positions = _stated(config, "max_source_positions", prefer=SOUND)
        frames = 2 * positions if positions else None
        self.sizes = _Sizes(
            tokens=tokens,
            image=_pair(image_size or stated or IMAGE_SIZE),
            frames=frames or FRAMES_OF_SPEECH,
            bins=_stated(config, *MEL_BINS, prefer=SOUND) or 80,
        )

    def usual(self, sizes: _Sizes) -> dict[str, Field | bool]:
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
        labels = _transformers_labels(
            self._name, self._config, self._vocabulary(), self._text_shape(sizes), sizes.image
        )
        return fields | {key: field for key, field in labels.items() if key in self._accepts}

    def variants(self) -> Iterator[_Sizes]:
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
        codebooks = _stated(self._config, "num_codebooks")
        if codebooks and "input_ids" in main:
            yield from (replace(sizes, codebooks=codebooks + more) for more in (0, 1))

    def asked_for(
        self, error: Exception | None, given: Mapping[str, Any], sizes: _Sizes
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

    def _made(self, names: Iterable[str], sizes: _Sizes) -> dict[str, Field | bool]:
        made = {name: self._field(name, sizes) for name in names}
        return {name: field for name, field in made.items() if field is not None}

    def _vocabulary(self) -> int:
        return _stated(self._text, "vocab_size") or _stated(self._config, "vocab_size") or BYTES

    def _field(self, name: str, sizes: _Sizes) -> Field | None:
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
            width = _stated(config, side, "hidden_size", "d_model")
        else:  # such as visual_feats of visual_feat_dim numbers each
            width = _stated(config, f"{name}_dim", f"{name.removesuffix('s')}_dim")
        return Field((*tokens, width), self._dtype) if width else None

    def _text_shape(self, sizes: _Sizes) -> tuple[int, ...]:
        return (sizes.tokens, *((sizes.codebooks,) if sizes.codebooks else ()))

    def _masked(self, name: str, sizes: _Sizes) -> tuple[int, ...]:
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
        return _stated(self._config, "num_channels", "in_channels", prefer=SIGHT) or 3

    def _clip(self) -> int:
        return _stated(self._config, "num_frames", "frames_per_clip", prefer=SIGHT) or CLIP_FRAMES

    def _pixels(self, sizes: _Sizes) -> Field:
        """Return images; where a grid says how many patches each has, the patches of all."""
        config, dtype = self._config, self._dtype
        if self._is_packed:
            height, width = self._patch()
            if any(PATCH_PAIRS.search(name) for name in self._accepts):
                return Field((GRID * GRID, self._channels() * height * width), dtype)
            depth = _stated(config, "temporal_patch_size", "patch_temporal", prefer=SIGHT) or 1
            patch = (self._channels() * depth, height, width)
            return Field((math.prod(patch),) if sizes.is_folded else patch, dtype, rows=GRID**3)
        vision = getattr(config, "vision_config", config)
        frames = _stated(vision, "num_frames", nested=False)
        lead = (*((frames,) if frames else ()), *sizes.images)
        return Field((*lead, self._channels(), *sizes.image), dtype)

    def _patch(self) -> tuple[int, int]:
        return _pair(_stated(self._config, "patch_size", prefer=SIGHT) or 16)

    def _spectrogram(self, sizes: _Sizes) -> tuple[int, ...]:
        if sizes.wave is None:  # in place of a waveform
            return (_stated(self._config, "max_length") or sizes.frames, sizes.bins)
        shape = (sizes.frames, sizes.bins) if sizes.is_turned else (sizes.bins, sizes.frames)
        return (*sizes.channels, *shape)

    def _series(self, name: str) -> tuple[int, ...]:
        """Return the shape of a time series: its steps, and its channels where they are several."""
        config = self._config
        if name.startswith("future"):
            steps = _stated(config, "prediction_length") or 1
        else:
            lags = getattr(config, "lags_sequence", None) or [0]
            steps = (_stated(config, "context_length") or TOKENS) + max(lags)
        if name.endswith("_features"):
            return (steps, getattr(config, "num_time_features", 0))
        width = _stated(config, "num_input_channels") or _stated(config, "input_size") or 1
        has_channels = width > 1 or hasattr(config, "num_input_channels")
        return (steps, width) if has_channels else (steps,)


def _stated(config: Any, *names: str, prefer: str = "", nested: bool = True) -> Any:
    """Return the first of some sizes that a config states, or one of those nested in it.

    Args:
        config: asked first; then its own configs, depth first.
        names: of fields, the likeliest first.
        prefer: a pattern of the nested configs to ask before the others.
        nested: whether to ask those at all.
    """
    for name in names:
        value = getattr(config, name, None)
        if value and not isinstance(value, (bool, str)):
            return value
    parts = {key: part for key, part in vars(config).items() if hasattr(part, "to_dict")}
    for key in sorted(parts, key=lambda key: not re.search(prefer, key)):
        value = _stated(parts[key], *names, prefer=prefer) if nested else None
        if value:
            return value
    return None


def _transformers_labels(
    name: str, config: Any, vocabulary: int, tokens: tuple[int, ...], size: tuple[int, int]
) -> dict[str, Field]:
    """Return the labels of a head, known by its class name; none for a model without a head."""
    classes = max(getattr(config, "num_labels", 1), 1)
    if LM_HEAD.search(name):
        return {"labels": Field(tokens, high=vocabulary)}
    if re.search(r"For(Sequence|Image|Audio|Video)Classification", name):
        if getattr(config, "problem_type", None) == "multi_label_classification":
            return {"labels": Field((classes,), torch.float32)}
        if classes == 1:
            return {"labels": Field((), torch.float32)}
        return {"labels": Field((), high=classes)}
    if "ForTokenClassification" in name:
        return {"labels": Field(tokens, high=classes)}
    if "ForQuestionAnswering" in name:
        return {key: Field((), high=tokens[0]) for key in ("start_positions", "end_positions")}
    if "ForMultipleChoice" in name:
        return {"labels": Field((), high=CHOICES)}
    if "ForNextSentencePrediction" in name:
        return {"labels": Field((), high=2)}
    if "ForPreTraining" in name:
        high = 2 if "Electra" in name else vocabulary
        return {"labels": Field(tokens, high=high), "next_sentence_label": Field((), high=2)}
    if "ForSemanticSegmentation" in name:
        return {"labels": Field(size, high=classes)}
    if "ForCTC" in name:
        # Token 0 is the blank, which no transcript holds.
        return {"labels": Field(tokens, low=1, high=vocabulary)}
    return {}


def _context(model: Any, text: Any, seq: int | None) -> int:
    """Return the length of a sequence: what was asked, else what the positions allow, capped.

    Tables of positions that skip a padding index (RoBERTa) hold fewer than the config says.
    """
    limit = getattr(text, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 1:
        return seq or CONTEXT_WITHOUT_LIMIT
    learned = False
    usable = limit
    for name, module in model.named_modules():
        is_table = isinstance(module, nn.Embedding) and POSITIONS.search(name.rpartition(".")[2])
        if is_table and limit <= module.num_embeddings <= limit + 2:
            learned = True
            if module.padding_idx is not None:
                usable = min(usable, module.num_embeddings - module.padding_idx - 1)
    if learned and seq and seq > usable:
        raise SampleError(
            f"seq={seq} is longer than the {usable} positions of {type(model).__name__}: use a "
            f"shorter one, or build the model with max_position_embeddings={seq + limit - usable}"
        )
    return seq or min(usable, LONGEST_CONTEXT)
