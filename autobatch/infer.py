"""What a model takes as input, found without running it on data.

Invariant: the model is read, never run, moved or changed. What a model states about itself is
believed; what is guessed is first tried on a copy with fake weights, which costs no memory
whatever the model's size and device. Where nothing runs, an error shows the missing argument.
"""

from __future__ import annotations

import copy
import inspect
import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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
LABELS = frozenset(
    {"labels", "start_positions", "end_positions", "next_sentence_label", "return_loss"}
)
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
    """

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.int64
    high: int = 1
    low: int = 0
    batch_dim: int = 0

    def make(self, n: int, generator: torch.Generator) -> Tensor:
        shape = (*self.shape[: self.batch_dim], n, *self.shape[self.batch_dim :])
        if self.dtype.is_floating_point:
            return torch.randn(shape, dtype=self.dtype, device="cpu", generator=generator)
        return torch.randint(
            self.low, self.high, shape, dtype=self.dtype, device="cpu", generator=generator
        )

    def __str__(self) -> str:
        sizes = [str(size) for size in self.shape]
        sizes.insert(self.batch_dim, "n")
        return f"{str(self.dtype).removeprefix('torch.')} [{', '.join(sizes)}]"


Fields: TypeAlias = "Field | tuple[Field, ...] | Mapping[str, Field | bool]"


def infer(model: nn.Module, *, seq: int | None = None, image_size: int | None = None) -> Inferred:
    """Infer a model's inputs and training loss from what it says about itself.

    Hugging Face models: from `config` and the signature of `forward`; the sequence is as long as
    the positions allow, at most 1,024 tokens (512 where there is no limit), and speech lasts 10 s.
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
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _first_that_runs(model: nn.Module, candidates: Iterable[Fields]) -> tuple[Fields, Any]:
    """Return the first candidate that a fake copy of the model accepts, and its fake output.

    The output is None where fake tensors cannot tell, because the model reads values.

    Raises:
        SampleError: the model rejects every candidate.
    """
    why = "no layer tells what it takes"
    mode = FakeTensorMode()
    try:
        clone = _fake_copy(model, mode).train()
    except Exception as error:
        raise _unknown(model, f"it cannot be copied: {_first_line(error)}") from error
    for fields in candidates:
        try:
            with mode, torch.no_grad(), _quiet():
                output = _call(clone, _builder(fields)(TRIED_SAMPLES))
        except CANNOT_TELL:
            return fields, None
        except Exception as error:
            why = f"on {_describe(fields)} it raises {_first_line(error)}"
            continue
        if _keeps_samples(output):
            return fields, output
        why = f"on {_describe(fields)} the output {tuple(output.shape)} mixes the samples"
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
    fields = _transformers_fields(model, seq, image_size)
    # The inputs of an LM head are certain, and trying them costs a second on a large model.
    if not ("input_ids" in fields and LM_HEAD.search(name)):
        _first_that_runs(model, [fields])
    labels = ", ".join(sorted(LABELS.intersection(fields)))
    return Inferred(
        batch=_builder(fields),
        loss=None,
        note=f"inputs inferred: {_describe(fields)} from the config of {name}",
        loss_note=f"loss inferred: output.loss of {name} given {labels}" if labels else SURROGATE,
    )


def _transformers_fields(
    model: Any, seq: int | None, image_size: int | None
) -> dict[str, Field | bool]:
    """Return the arguments of `forward` that training needs, from its signature and the config."""
    accepts = inspect.signature(model.forward).parameters
    config, main, name = model.config, model.main_input_name, type(model).__name__
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    contrastive = "return_loss" in accepts and "pixel_values" in accepts
    fields: dict[str, Field | bool] = {}
    size = _image_size(config, image_size)
    tokens: tuple[int, ...] = (min(LABEL_TOKENS, getattr(text, "max_target_positions", TOKENS)),)

    if main == "input_ids":
        tokens = (_context(model, text, seq),)
        lead = (CHOICES,) if "ForMultipleChoice" in name else ()
        # no attention_mask: one without padding is dropped by transformers itself in a real run
        fields["input_ids"] = Field((*lead, *tokens), high=text.vocab_size)
    if main == "pixel_values" or contrastive:
        fields["pixel_values"] = Field(_pixels(config, size), _float_dtype(model))
    if main == "input_features":
        shape = (config.num_mel_bins, 2 * config.max_source_positions)
        fields["input_features"] = Field(shape, _float_dtype(model))
    if main == "input_values":
        fields["input_values"] = Field((SECONDS_OF_SPEECH * SPEECH_HERTZ,), _float_dtype(model))
    if contrastive:
        fields["return_loss"] = True
    if "decoder_input_ids" in accepts:
        fields["decoder_input_ids"] = Field(tokens, high=text.vocab_size)
    labels = _transformers_labels(name, config, text, tokens, size)
    return fields | {key: field for key, field in labels.items() if key in accepts}


def _transformers_labels(
    name: str, config: Any, text: Any, tokens: tuple[int, ...], size: tuple[int, int]
) -> dict[str, Field]:
    """Return the labels of a head, known by its class name; none for a model without a head."""
    classes = max(getattr(config, "num_labels", 1), 1)
    if LM_HEAD.search(name):
        return {"labels": Field(tokens, high=text.vocab_size)}
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
        high = 2 if "Electra" in name else getattr(text, "vocab_size", 1)
        return {"labels": Field(tokens, high=high), "next_sentence_label": Field((), high=2)}
    if "ForSemanticSegmentation" in name:
        return {"labels": Field(size, high=classes)}
    if "ForCTC" in name:
        # Token 0 is the blank, which no transcript holds.
        return {"labels": Field(tokens, low=1, high=text.vocab_size)}
    return {}


def _context(model: Any, text: Any, seq: int | None) -> int:
    """Return the length of a sequence: what was asked, else what the positions allow, capped.

    Tables of positions that skip a padding index (RoBERTa) hold fewer than the config says.
    """
    limit = getattr(text, "max_position_embeddings", None)
    if not limit or limit < 0:
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


def _image_size(config: Any, image_size: int | None) -> tuple[int, int]:
    vision = getattr(config, "vision_config", config)
    return _pair(image_size or getattr(vision, "image_size", None) or IMAGE_SIZE)


def _pixels(config: Any, size: tuple[int, int]) -> tuple[int, ...]:
    vision = getattr(config, "vision_config", config)
    frames = getattr(vision, "num_frames", None)
    return (*((frames,) if frames else ()), getattr(vision, "num_channels", 3), *size)
