"""What loading a library's model takes: its import, options of the SPEC, building on `meta`.

Invariant: weights are random, and where the constructor allows it they are on `meta` and take no
memory; whatever goes wrong is one SpecError.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import nn

from autobatch.errors import SpecError
from autobatch.support.installing import install_line
from autobatch.support.wording import one_line
from autobatch.workload.infer.dry_run import quiet

__all__ = ["Options", "import_library", "model_names", "on_meta", "rejected"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Options that would fetch weights.
DOWNLOADS = frozenset({"pretrained", "checkpoint_path", "weights", "weights_backbone"})


class Options(dict[str, Any]):
    """The options of a SPEC; those that several libraries share are taken out by name."""

    def take_dtype(self) -> torch.dtype | None:
        """Take out the dtype of the parameters; None where none is asked for."""
        name = self.pop("dtype", None)
        if name is None:
            return None
        dtype = DTYPES.get(name) or getattr(torch, str(name), None)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise SpecError(f"dtype={name} is not a dtype of parameters: use {', '.join(DTYPES)}")
        return dtype

    def take_size(self, key: str) -> int | None:
        """Take out a size; None where none is asked for."""
        size: Any = self.pop(key, None)
        if size is not None and (not isinstance(size, int) or size < 1):
            raise SpecError(f"{key}={size} is not a size: use a positive whole number")
        return size

    def refuse_downloads(self) -> None:
        """Raise SpecError for an option that would fetch weights."""
        for key in sorted(DOWNLOADS.intersection(self)):
            raise SpecError(
                f"{key}= is not taken: weights are random here, and nothing is downloaded"
            )


def import_library(name: str, extra: str) -> Any:
    """Import an optional library, which the `extra` of this package installs."""
    try:
        with quiet():
            return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name == name:
            raise SpecError(f"{name} is not installed: {install_line(extra)}") from None
        raise SpecError(f"{name} cannot be imported ({one_line(error)})") from error


def model_names() -> Iterator[tuple[str, Collection[str]]]:
    """Yield the prefix of each library that is installed, and the names of its models."""
    listings: tuple[tuple[str, str, Callable[[Any], Collection[str]]], ...] = (
        ("hf", "transformers", lambda library: list(library.CONFIG_MAPPING.keys())),
        ("timm", "timm", lambda library: library.list_models()),
        ("torchvision", "torchvision", lambda library: library.models.list_models()),
    )
    for prefix, package, names in listings:
        with contextlib.suppress(SpecError):
            yield prefix, names(import_library(package, prefix))


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    """Build on `meta`, or on the CPU where the constructor reads values or mixes devices."""
    with quiet():
        try:
            with torch.device("meta"):
                return build()
        except RuntimeError:
            return build()


def rejected(spec: str, options: Options, error: Exception) -> SpecError:
    """Return the error of a model that its library did not build."""
    given = ", ".join(f"{key}={value}" for key, value in options.items()) or "its defaults"
    return SpecError(f"{spec} cannot be built with {given}: {one_line(error)}")
