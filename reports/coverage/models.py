"""The models that are tried: of timm by name, of transformers from a small config; all on `meta`.

Invariant: nothing is downloaded.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from autobatch.workload.spec.library import on_meta
from autobatch.workload.spec.transformers import offline
from reports.common.configs import STATED
from reports.common.heads import heads_of
from reports.common.shrink import LEVELS, merged, shrink
from reports.coverage.subjects import Subject

NO_HEAD = "no Auto class builds it"
NO_LIBRARY = "a library that it needs is not installed"
NO_CONFIG = "its config has no defaults"
NO_FORWARD = "its model has no forward pass of its own"
NO_BATCH = "its forward pass takes an object that is no tensor, such as a session of inference"
NO_MODEL = "its model cannot be built from the defaults of its config"


class NotBuiltError(Exception):
    """A subject has no model here.

    Attributes:
        cause: one of the constants above.
    """

    def __init__(self, cause: str, reason: str) -> None:
        super().__init__(reason)
        self.cause = cause


@dataclass(frozen=True, slots=True)
class Candidate:
    """A model to try.

    Attributes:
        head: the Auto class that built it; empty for timm.
        cut: what its config was cut by; empty for timm.
    """

    model: nn.Module
    head: str = ""
    cut: str = ""


def candidates(subject: Subject) -> Iterator[Candidate]:
    """Yield the models of a subject, the smallest first; one that is predicted is enough.

    Raises:
        NotBuiltError: there is none.
    """
    if subject.library == "timm":
        yield Candidate(_timm_model(subject.name))
    else:
        yield from _transformers_models(subject.name)


def _timm_model(name: str) -> nn.Module:
    timm = importlib.import_module("timm")
    try:
        return on_meta(partial(timm.create_model, name, pretrained=False))
    except ImportError as error:
        raise NotBuiltError(NO_LIBRARY, _one_line(error)) from error
    except Exception as error:
        raise NotBuiltError(NO_MODEL, _one_line(error)) from error


def _transformers_models(kind: str) -> Iterator[Candidate]:
    transformers = importlib.import_module("transformers")
    try:
        config_class = transformers.CONFIG_MAPPING[kind]
        fields = merged(config_class().to_dict(), STATED.get(kind, {}))
    except Exception as error:
        raise NotBuiltError(NO_CONFIG, _one_line(error)) from error
    first: Exception | None = None
    is_built = False
    for level in LEVELS:
        try:
            config = config_class.from_dict(shrink(fields, level))
            head, model = _built(transformers, config)
        except ImportError as error:
            raise NotBuiltError(NO_LIBRARY, _one_line(error)) from error
        except NotBuiltError:
            raise
        except Exception as error:
            first = first or error
            continue
        if type(model).forward is nn.Module.forward:
            raise NotBuiltError(NO_FORWARD, f"{type(model).__name__} only generates")
        if (name := _object_taken(model)) is not None:
            raise NotBuiltError(NO_BATCH, f"{type(model).__name__} takes {name}")
        is_built = True
        yield Candidate(model, head, str(level))
    if not is_built:
        assert first is not None
        raise NotBuiltError(NO_MODEL, _one_line(first)) from first


def _object_taken(model: nn.Module) -> str | None:
    """Return an argument that must be an object of transformers, so that no batch can be made."""
    for parameter in inspect.signature(model.forward).parameters.values():
        kind = parameter.annotation
        home = getattr(kind, "__module__", "") if isinstance(kind, type) else ""
        if parameter.default is parameter.empty and home.startswith("transformers.models."):
            return f"{parameter.name}: {kind.__name__}"
    return None


def _built(transformers: Any, config: Any) -> tuple[str, nn.Module]:
    """Build the model of the first head that can be, and name its Auto class."""
    config.architectures = config.architectures or []  # looked through where heads are several
    first: Exception | None = None
    for auto in heads_of(transformers, config):
        found = _from_config(auto, config)
        if isinstance(found, nn.Module):
            return auto.__name__, found
        first = first or found
    raise first or NotBuiltError(NO_HEAD, f"no Auto class has {type(config).__name__}")


def _from_config(auto: Any, config: Any) -> nn.Module | Exception:
    try:
        with offline():
            return on_meta(partial(auto.from_config, config))
    except Exception as error:
        return error


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
