"""Models of transformers, by model type or from a local config.

Invariant: the Hugging Face hub is never asked for anything.
"""

from __future__ import annotations

import importlib
import json
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from autobatch.errors import SpecError
from autobatch.support.patching import patched
from autobatch.support.wording import near, one_line
from autobatch.workload.infer.dry_run import quiet
from autobatch.workload.infer.infer import infer
from autobatch.workload.spec.library import Options, import_library, on_meta, rejected
from autobatch.workload.workload import Workload

__all__ = ["auto_class", "load_transformers", "offline"]

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


def load_transformers(name: str, options: Options) -> Workload:
    """Build a model of transformers on `meta`, with the inputs that are inferred.

    Args:
        name: a model type, or a local config.json or a folder with one.
        options: `dtype`, `seq` and `head`; the others override attributes of the config.

    Raises:
        SpecError: there is no such model type, head or attribute, or no such model is built.
        SampleError: its inputs cannot be inferred.
    """
    transformers = import_library("transformers", "hf")
    dtype, seq = options.take_dtype(), options.take_size("seq")
    head = options.pop("head", None)
    config = _transformers_config(transformers, name, options)
    auto = auto_class(transformers, config, head)
    kept = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    arguments = {"dtype": dtype or kept, "trust_remote_code": False}
    try:
        with offline():
            model = on_meta(lambda: auto.from_config(config, **arguments))
    except Exception as error:
        raise rejected(f"hf:{name}", options, error) from error
    return infer(model, seq=seq).workload(model)


def _transformers_config(transformers: Any, name: str, options: Options) -> Any:
    """Make the config of a model type or of a local config.json, with the options on top."""
    types = list(transformers.CONFIG_MAPPING.keys())
    stated: dict[str, Any] = {}
    path = Path(name).expanduser()
    file = path / "config.json" if path.is_dir() else path
    # a folder of that name may be anything: a project, or the report that is about to be written
    if file.exists() or (path.is_dir() and name not in types):
        stated = _read_config(file)
    kind = stated.get("model_type", name)
    if kind not in types:
        hint = (
            "; nothing is downloaded: give a model type, or a folder with its config.json"
            if "/" in kind
            else near(kind.lower(), types)
        )
        raise SpecError(f"transformers has no model type {kind!r}{hint}")
    config_class = transformers.CONFIG_MAPPING[kind]
    plain = config_class()
    known = {*plain.to_dict(), *plain.attribute_map, *stated, *CONFIG_EXTRAS}
    for key in options:
        if key not in known:
            raise SpecError(f"the config of {kind} has no {key!r}{near(key, known)}")
    try:
        with quiet():
            return config_class.from_dict({**stated, **options})
    except Exception as error:
        raise rejected(f"hf:{name}", options, error) from error


def _read_config(path: Path) -> dict[str, Any]:
    try:
        stated = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SpecError(f"{path} cannot be read as a config ({one_line(error)})") from error
    if not isinstance(stated, dict) or not isinstance(stated.get("model_type"), str):
        raise SpecError(f"{path} is no transformers config: it has no model_type")
    return stated


def auto_class(transformers: Any, config: Any, head: str | None) -> Any:
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


def offline() -> AbstractContextManager[None]:
    """Make any request to the Hugging Face hub fail while a model is built."""
    return patched(importlib.import_module("huggingface_hub.constants"), HF_HUB_OFFLINE=True)
