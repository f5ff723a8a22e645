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

import json
from typing import Any
from urllib.parse import parse_qsl, urlencode

from torch import nn

from autobatch.errors import SpecError
from autobatch.workload.spec.library import Options
from autobatch.workload.spec.timm import load_timm
from autobatch.workload.spec.torchvision import load_torchvision
from autobatch.workload.spec.transformers import load_transformers
from autobatch.workload.spec.user_code import PREFIXES, load_function
from autobatch.workload.workload import Workload

__all__ = ["load_sized", "load_spec"]


def load_spec(spec: str) -> nn.Module | Workload:
    """Return what a SPEC names: of a library, the Workload of training that model.

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
    loaders = {"timm": load_timm, "torchvision": load_torchvision, "hf": load_transformers}
    if not colon or prefix not in loaders:
        return load_function(spec)
    name, _, query = rest.partition("?")
    if not name.strip():
        example = {"timm": "resnet50", "torchvision": "resnet50", "hf": "gpt2"}[prefix]
        raise SpecError(f"{spec!r} names no model: write {prefix}:NAME, such as {prefix}:{example}")
    return loaders[prefix](name, _options(spec, query))


def load_sized(spec: str, name: str, value: int) -> nn.Module | Workload:
    """Return what a SPEC names, with one of its sizes set: the length of sequences, say.

    Args:
        spec: as in `load_spec`.
        name: of an option of a library's model, or of an argument of the user's function.
        value: of that size.

    Raises:
        SpecError: as `load_spec`, or there is no option or argument of that name.
        SampleError: as `load_spec`.
        WorkloadError: as `load_spec`.
    """
    if spec.partition(":")[0] in PREFIXES:
        return load_spec(_with_option(spec, name, value))
    return load_function(spec, **{name: value})


def _with_option(spec: str, name: str, value: object) -> str:
    """Return a SPEC of a library with an option added, or with another value of it.

    >>> _with_option("hf:gpt2?seq=1024&n_layer=24", "seq", 512)
    'hf:gpt2?seq=512&n_layer=24'
    """
    model, _, query = spec.partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True)) | {name: str(value)}
    return f"{model}?{urlencode(options)}"


def _options(spec: str, query: str) -> Options:
    """Parse `key=value&key=value`: numbers, booleans, null and lists as in JSON, else text."""
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=True) if query else []
    except ValueError:
        raise SpecError(
            f"{spec!r} has options that are not key=value joined by &: {query!r}"
        ) from None
    return Options((key, _value(text)) for key, text in pairs)


def _value(text: str) -> Any:
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
