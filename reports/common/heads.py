"""The classes of transformers that build a model from a config."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from autobatch.errors import SpecError
from autobatch.workload.spec.transformers import auto_class


def heads_of(transformers: Any, config: Any) -> Iterator[Any]:
    """Yield the Auto class of `hf:`, then any other that knows the config."""
    with suppress(SpecError):
        yield auto_class(transformers, config, None)
    home = transformers.models.auto.modeling_auto
    for name in sorted(vars(home)):
        mapping = getattr(getattr(home, name), "_model_mapping", None)
        # its truth value would import every config there is
        if name.startswith("AutoModel") and mapping is not None and type(config) in mapping:
            yield getattr(home, name)
