"""How a library is imported and one of its models built.

Invariant: weights are random, and where the constructor allows it they are on `meta` and take no
memory; whatever goes wrong is one SpecError.
"""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from autobatch.errors import SpecError
from autobatch.workload.spec.options import Options
from autobatch.workload.spec.wording import one_line

__all__ = ["harmless_warnings", "import_library", "on_meta", "rejected"]


def import_library(name: str, extra: str) -> Any:
    """Import an optional library.

    Raises:
        SpecError: it cannot be imported, or is not installed; then it names the `extra` that
            installs it.
    """
    try:
        with harmless_warnings():
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise SpecError(f"{name} cannot be imported ({one_line(error)})") from error
        raise SpecError(f'{name} is not installed: pip install "autobatch-gpu[{extra}]"') from None
    except (ImportError, RuntimeError) as error:
        raise SpecError(f"{name} cannot be imported ({one_line(error)})") from error


@contextmanager
def harmless_warnings() -> Iterator[None]:
    """Silence deprecations and what libraries say of weights, which are random and never run."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    """Build on `meta`, or on the CPU where the constructor reads values or mixes devices."""
    with harmless_warnings():
        try:
            with torch.device("meta"):
                return build()
        except RuntimeError:
            return build()


def rejected(spec: str, options: Options, error: Exception) -> SpecError:
    """Return the error of a model that its library did not build."""
    given = ", ".join(f"{key}={value}" for key, value in options.items()) or "its defaults"
    return SpecError(f"{spec} cannot be built with {given}: {one_line(error)}")
