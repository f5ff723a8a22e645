"""Sizes read from the configs of transformers."""

from __future__ import annotations

import re
from typing import Any

from autobatch.errors import SampleError
from autobatch.workload.infer.plain import position_tables

__all__ = ["AUDIO", "VISION", "context_of", "stated", "text_configs"]

LONGEST_CONTEXT = 1024
CONTEXT_WITHOUT_LIMIT = 512
# Names of nested vision and audio configs.
VISION, AUDIO = "vision|image|video|backbone|encoder", "audio|speech|encoder"


def stated(config: Any, *names: str, prefer: str = "", nested: bool = True) -> Any:
    """Return the first of these sizes that a config or one nested in it states; None if none does.

    Args:
        config: is asked first, then the configs nested in it, depth first.
        names: the fields that may hold the size, the likeliest first.
        prefer: a pattern; nested configs whose name matches are asked before the others.
        nested: whether nested configs are asked at all.
    """
    for name in names:
        value = getattr(config, name, None)
        if value and not isinstance(value, (bool, str)):
            return value
    parts = {key: part for key, part in vars(config).items() if hasattr(part, "to_dict")}
    for key in sorted(parts, key=lambda key: not re.search(prefer, key)):
        value = stated(parts[key], *names, prefer=prefer) if nested else None
        if value:
            return value
    return None


def text_configs(config: Any) -> tuple[Any, Any]:
    """Return the configs of the text that a model reads and of the text that it writes.

    Most models have one config for both.
    """
    if not hasattr(config, "get_text_config"):
        return config, config
    try:
        text = config.get_text_config()
    except ValueError:  # it has one of each
        return config.get_text_config(encoder=True), config.get_text_config(decoder=True)
    return text, text


def context_of(model: Any, text: Any, seq: int | None) -> int:
    """Return the length of a sequence: the one asked for, else what the positions allow, capped.

    A table of positions that skips a padding index (RoBERTa's) holds fewer than the config says.

    Raises:
        SampleError: the length asked for exceeds a table of positions.
    """
    limit = getattr(text, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 1:
        return seq or CONTEXT_WITHOUT_LIMIT
    learned = False
    usable = limit
    for table in position_tables(model):
        if limit <= table.num_embeddings <= limit + 2:
            learned = True
            if table.padding_idx is not None:
                usable = min(usable, table.num_embeddings - table.padding_idx - 1)
    if learned and seq and seq > usable:
        raise SampleError(
            f"seq={seq} is longer than the {usable} positions of {type(model).__name__}: use a "
            f"shorter one, or build the model with max_position_embeddings={seq + limit - usable}"
        )
    return seq or min(usable, LONGEST_CONTEXT)
