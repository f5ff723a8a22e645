"""A model named by one string, as on the command line.

Invariant: loading a SPEC downloads nothing. Library models get random weights, on the `meta`
device wherever their construction allows it, so that seventy billion parameters cost nothing.

    file.py:function             a function in a file, without arguments, that returns a model
    package.module:function      or a Workload (a module or Workload itself will do)
    timm:resnet50?num_classes=10&img_size=384
    torchvision:resnet50
    hf:gpt2?seq=1024&n_layer=24  a transformers model type, or a folder or file with its config
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import json
import logging
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias, TypeVar
from urllib.parse import parse_qsl

import torch
from torch import nn

from autobatch.errors import SpecError, WorkloadError
from autobatch.workload.infer import Inferred, infer
from autobatch.workload.workload import Workload

__all__ = ["LoadedSpec", "load_spec"]

Options: TypeAlias = dict[str, Any]
T = TypeVar("T")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FORMS = "file.py:function, package.module:function, timm:NAME, torchvision:NAME or hf:TYPE"
# Options that would fetch weights.
DOWNLOADS = frozenset({"pretrained", "checkpoint_path", "weights", "weights_backbone"})

# The transformers class of every head, in the order in which a config's usual one is looked for.
HEADS = {
    "seq2seq": "AutoModelForSeq2SeqLM",
    "speech-seq2seq": "AutoModelForSpeechSeq2Seq",
    "masked-lm": "AutoModelForMaskedLM",
    "causal-lm": "AutoModelForCausalLM",
    "image-text-to-text": "AutoModelForImageTextToText",
    "contrastive": "AutoModelForZeroShotImageClassification",
    "image-classification": "AutoModelForImageClassification",
    "video-classification": "AutoModelForVideoClassification",
    "semantic-segmentation": "AutoModelForSemanticSegmentation",
    "ctc": "AutoModelForCTC",
    "audio-classification": "AutoModelForAudioClassification",
    "sequence-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "base": "AutoModel",
}
ENCODER_DECODER_HEADS = frozenset({"seq2seq", "speech-seq2seq"})
CONFIG_EXTRAS = frozenset({"num_labels", "attn_implementation"})


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedSpec:
    """What a SPEC stands for: a model or a Workload, never both.

    Attributes:
        name: the SPEC as the user wrote it, for display.
        model: the model; None where the function returned a Workload.
        workload: the Workload; None where there is a model.
        inputs: a library model's inputs and loss; None for a user's function.
    """

    name: str
    model: nn.Module | None = None
    workload: Workload | None = None
    inputs: Inferred | None = None

    @property
    def subject(self) -> nn.Module | Workload:
        """What to hand to `tune`; a library model keeps the inputs that its options ask for."""
        if self.workload is not None:
            return self.workload
        assert self.model is not None
        return self.model if self.inputs is None else self.inputs.workload(self.model)


def load_spec(spec: str) -> LoadedSpec:
    """Build the model or Workload that a SPEC names.

    The folder of a file, or the current folder for a module, is on `sys.path` while the code is
    imported and the function runs. Options after `?` go to timm's and torchvision's model
    functions; for `hf:` they override attributes of the config. Common options: `dtype=bf16`
    (of the parameters); `img_size` for timm and torchvision; `seq` and `head` (such as causal-lm or
    base) for `hf:`.

    Raises:
        SpecError: the SPEC names no file, module, function or model, or an option is unknown.
        SampleError: the inputs of a library model cannot be inferred.
        WorkloadError: the user's own code raised; the original error is chained.
    """
    prefix, colon, rest = spec.partition(":")
    loaders = {"timm": _load_timm, "torchvision": _load_torchvision, "hf": _load_transformers}
    if colon and prefix in loaders:
        name, _, query = rest.partition("?")
        model, inputs = loaders[prefix](name, _options(spec, query))
        return LoadedSpec(name=spec, model=model, inputs=inputs)
    return _load_function(spec)


def _options(spec: str, query: str) -> Options:
    """Parse `key=value&key=value`: numbers, booleans, null and lists as in JSON, else text."""
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=True) if query else []
    except ValueError:
        raise SpecError(
            f"{spec!r} has options that are not key=value joined by &: {query!r}"
        ) from None
    return {key: _value(text) for key, text in pairs}


def _value(text: str) -> Any:
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _near(word: str, known: Iterable[str]) -> str:
    """Return ": did you mean ...?" with the closest names, or nothing."""
    names = difflib.get_close_matches(word, list(known), n=3)
    return f"; did you mean {' or '.join(names)}?" if names else ""


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _load_function(spec: str) -> LoadedSpec:
    source, _, name = spec.rpartition(":")
    if not source or not name:
        raise SpecError(f"{spec!r} is no SPEC: write {FORMS}")
    is_file = source.endswith(".py") or Path(source).is_file()
    with _importable(Path(source).resolve().parent if is_file else Path.cwd()):
        module = _import_file(source) if is_file else _import_module(source)
        if not hasattr(module, name):
            known = [key for key in vars(module) if not key.startswith("_")]
            raise SpecError(f"{source} has no function {name!r}{_near(name, known)}")
        made = _made_by(getattr(module, name), spec)
    if isinstance(made, Workload):
        return LoadedSpec(name=spec, workload=made)
    if isinstance(made, nn.Module):
        return LoadedSpec(name=spec, model=made)
    raise SpecError(
        f"{spec} returned {type(made).__name__}: it must return a torch.nn.Module or an "
        "autobatch.Workload"
    )


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    before = list(sys.path)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path[:] = before


def _import_file(source: str) -> ModuleType:
    path = Path(source).resolve()
    if not path.is_file():
        siblings = [str(Path(source).with_name(other.name)) for other in path.parent.glob("*.py")]
        raise SpecError(f"no such file: {source}{_near(source, siblings)}")
    # Not the stem alone, or a file named torch.py would replace the real one.
    name = f"autobatch_spec_{path.stem}"
    found = importlib.util.spec_from_file_location(name, path)
    if found is None or found.loader is None:
        raise SpecError(f"{source} is not a Python file: write file.py:function")
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module
    try:
        _run_user_code(source, partial(found.loader.exec_module, module))
    except WorkloadError:
        del sys.modules[name]
        raise
    return module


def _import_module(source: str) -> ModuleType:
    try:
        return _run_user_code(source, lambda: importlib.import_module(source))
    except WorkloadError as error:
        cause = error.__cause__
        missing = cause.name if isinstance(cause, ModuleNotFoundError) else None
        if missing and (source == missing or source.startswith(f"{missing}.")):
            raise SpecError(f"no module named {missing!r}: write {FORMS}") from None
        raise


def _made_by(maker: Any, spec: str) -> Any:
    """Call a function of the user's; a model or Workload kept in a variable is taken as it is."""
    if isinstance(maker, (nn.Module, Workload)):
        return maker
    if not callable(maker):
        raise SpecError(f"{spec} is a {type(maker).__name__}: name a function that returns a model")
    try:
        inspect.signature(maker).bind()
    except TypeError as error:
        raise SpecError(
            f"{spec} needs arguments ({error}): name a function that can be called without any"
        ) from None
    return _run_user_code(spec, maker)


def _run_user_code(what: str, run: Callable[[], T]) -> T:
    try:
        return run()
    except (Exception, SystemExit) as error:
        raise WorkloadError(f"{what} raised {_one_line(error)}") from error


def _import_library(name: str, extra: str) -> Any:
    try:
        with _harmless_warnings():
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise SpecError(f"{name} cannot be imported ({_one_line(error)})") from error
        raise SpecError(f'{name} is not installed: pip install "autobatch-gpu[{extra}]"') from None
    except (ImportError, RuntimeError) as error:
        raise SpecError(f"{name} cannot be imported ({_one_line(error)})") from error


@contextmanager
def _harmless_warnings() -> Iterator[None]:
    """Silence what libraries say of deprecations and weights: these are random and never run."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    """Build on `meta`, or on the CPU where the constructor reads values or mixes devices."""
    with _harmless_warnings():
        try:
            with torch.device("meta"):
                return build()
        except RuntimeError:
            return build()


def _take_dtype(options: Options) -> torch.dtype | None:
    name = options.pop("dtype", None)
    if name is None:
        return None
    dtype = DTYPES.get(name) or getattr(torch, str(name), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise SpecError(f"dtype={name} is not a dtype of parameters: use {', '.join(DTYPES)}")
    return dtype


def _take_size(options: Options, key: str) -> int | None:
    size = options.pop(key, None)
    if size is not None and (not isinstance(size, int) or size < 1):
        raise SpecError(f"{key}={size} is not a size: use a positive whole number")
    return size


def _refuse_downloads(options: Mapping[str, Any]) -> None:
    for key in sorted(DOWNLOADS.intersection(options)):
        raise SpecError(f"{key}= is not taken: weights are random here, and nothing is downloaded")


def _load_timm(name: str, options: Options) -> tuple[nn.Module, Inferred]:
    timm = _import_library("timm", "timm")
    _refuse_downloads(options)
    if not timm.is_model(name):
        raise SpecError(f"timm has no model {name!r}{_near(name, timm.list_models())}")
    dtype, size = _take_dtype(options), _take_size(options, "img_size")
    if size:
        options["img_size"] = size

    def build(**options: Any) -> nn.Module:
        return _on_meta(lambda: timm.create_model(name, pretrained=False, **options))

    try:
        model = build(**options)
    except TypeError as error:
        if "'img_size'" not in str(error):
            raise _rejected(f"timm:{name}", options, error) from error
        # Convolutional networks take images of any size and no such option.
        del options["img_size"]
        try:
            model = build(**options)
        except Exception as second:
            raise _rejected(f"timm:{name}", options, second) from second
    except Exception as error:
        raise _rejected(f"timm:{name}", options, error) from error
    return _with_inputs(model, dtype, image_size=size)


def _rejected(spec: str, options: Options, error: Exception) -> SpecError:
    given = ", ".join(f"{key}={value}" for key, value in options.items()) or "its defaults"
    return SpecError(f"{spec} cannot be built with {given}: {_one_line(error)}")


def _load_torchvision(name: str, options: Options) -> tuple[nn.Module, Inferred]:
    models = _import_library("torchvision", "timm").models
    _refuse_downloads(options)
    if name not in models.list_models():
        raise SpecError(f"torchvision has no model {name!r}{_near(name, models.list_models())}")
    dtype, size = _take_dtype(options), _take_size(options, "img_size")
    # A backbone's weights would be downloaded by default.
    takes = inspect.signature(models.get_model_builder(name)).parameters
    offline = {key: None for key in ("weights", "weights_backbone") if key in takes}
    try:
        model = _on_meta(lambda: models.get_model(name, **offline, **options))
    except Exception as error:
        raise _rejected(f"torchvision:{name}", options, error) from error
    return _with_inputs(model, dtype, image_size=size)


def _with_inputs(
    model: nn.Module, dtype: torch.dtype | None, *, image_size: int | None
) -> tuple[nn.Module, Inferred]:
    model = model if dtype is None else model.to(dtype)
    return model, infer(model, image_size=image_size)


def _load_transformers(name: str, options: Options) -> tuple[nn.Module, Inferred]:
    transformers = _import_library("transformers", "hf")
    dtype, seq = _take_dtype(options), _take_size(options, "seq")
    head = options.pop("head", None)
    config = _transformers_config(transformers, name, options)
    auto = _auto_class(transformers, config, head)
    kept = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    arguments = {"dtype": dtype or kept, "trust_remote_code": False}
    try:
        with _offline():
            model = _on_meta(lambda: auto.from_config(config, **arguments))
    except Exception as error:
        raise _rejected(f"hf:{name}", options, error) from error
    return model, infer(model, seq=seq)


def _transformers_config(transformers: Any, name: str, options: Options) -> Any:
    """Make the config of a model type or of a local config.json, with the options on top."""
    stated: Options = {}
    path = Path(name).expanduser()
    if path.exists():
        stated = _read_config(path / "config.json" if path.is_dir() else path)
    kind = stated.get("model_type", name)
    types = list(transformers.CONFIG_MAPPING.keys())
    if kind not in types:
        hint = (
            "; nothing is downloaded: give a model type, or a folder with its config.json"
            if "/" in kind
            else _near(kind, types)
        )
        raise SpecError(f"transformers has no model type {kind!r}{hint}")
    config_class = transformers.CONFIG_MAPPING[kind]
    plain = config_class()
    known = {*plain.to_dict(), *plain.attribute_map, *stated, *CONFIG_EXTRAS}
    for key in options:
        if key not in known:
            raise SpecError(f"the config of {kind} has no {key!r}{_near(key, known)}")
    try:
        with _harmless_warnings():
            return config_class.from_dict({**stated, **options})
    except Exception as error:
        raise _rejected(f"hf:{name}", options, error) from error


def _read_config(path: Path) -> Options:
    try:
        stated = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SpecError(f"{path} cannot be read as a config ({_one_line(error)})") from error
    if not isinstance(stated, dict) or not isinstance(stated.get("model_type"), str):
        raise SpecError(f"{path} is no transformers config: it has no model_type")
    return stated


def _auto_class(transformers: Any, config: Any, head: str | None) -> Any:
    """Return the Auto class of a head, or of the head that such a config is usually trained with.

    An encoder-decoder is trained as one; of the language models, one that exists as a masked LM
    and is not configured as a decoder is trained as that.
    """
    heads = [
        head
        for head, auto in HEADS.items()
        if hasattr(transformers, auto)
        and type(config) in getattr(transformers, auto)._model_mapping
    ]
    if head is not None and head not in heads:
        raise SpecError(
            f"{config.model_type} has no head {head!r}: use one of {', '.join(heads) or 'none'}"
        )
    if not heads:
        raise SpecError(f"transformers builds no model from the config of {config.model_type}")
    decodes = getattr(config, "is_decoder", None) and "causal-lm" in heads
    skipped = set() if config.is_encoder_decoder else set(ENCODER_DECODER_HEADS)
    usual = [name for name in heads if name not in skipped and (name != "masked-lm" or not decodes)]
    return getattr(transformers, HEADS[head or usual[0]])


@contextmanager
def _offline() -> Iterator[None]:
    """Make any request to the Hugging Face hub fail while a model is built."""
    constants: Any = importlib.import_module("huggingface_hub.constants")
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
