"""Small versions of a transformers config, made by the names of its fields.

Invariant: a factor divides all widths and all counts of heads alike, in every nested config, so
that the size of a head and every ratio between widths stay as they were.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

Fields = dict[str, Any]

LAYERS, POSITIONS, VOCABULARY, LARGEST_FACTOR = 2, 128, 1024, 8

_WIDTH = re.compile(
    r"hidden_size|hidden_dim|d_model|n_embd|emb_dim|embed_dim|embeds?_size|embedding_size"
    r"|embeds?_hidden|embedding_dim|intermediate_size|feed_?forward_(dim|size)|ffn_(hidden|dim)"
    r"|d_ff|d_inner|n_inner|ff?n_dim|mlp_dim|linear_units|proj(ection|ector)?_(dim|size)"
    r"|proj(ection|ector)_(in|out)put_dim|pooler_output_size|conv_output_size|output_(dim|proj_dim)"
    r"|classifier_proj_size|input_size|dim_feedforward|dim_ff|dff|^dim$|_width$|^width$"
    r"|adapter_(in|out)_dim|adapter_input_size|word_embed_proj_dim|text_hidden"
)
_NO_WIDTH = re.compile(
    r"head|rank|patch_size|image|_per_layer|num_|vocab|kernel|position|conv_dim|ratio|audio_embed"
    r"|lora|codebook|state|feature_size|relative"
)
_HEADS = re.compile(r"(^|_)n?_?heads?(_per_stage)?$|^n_heads?_|num_\w*heads$")
_KEY_VALUE_HEADS = re.compile(r"kv_heads?|key_value_heads|head_kv|linear_num_key_heads")
_NO_HEADS = re.compile(r"dim_head|head_in_index|hash|prune|freeze")
_LAYERS = re.compile(
    r"^(n|num|num_hidden)_layers?$|^layers$|^depth$|^num_\w*hidden_layers$|^n_layers$"
    r"|^(num_)?(t2u_|speech_)?(encoder|decoder)_(num_)?(hidden_)?layers$|num_blocks$"
    r"|^(encoder|decoder|resampler|mit_num|qformer|attention|vision|text)_\w*layers$"
    r"|_depth$|^num_(sliding|global|attention|transformer|dense|decoder|encoder)\w*_layers$"
)
_NO_LAYERS = re.compile(
    r"kv_shared|feat_extract|adapter|lstm|max_|min_|residual|cross_attention|head"
)
_STAGES = re.compile(r"^depths$|blocks_per_stage|num_blocks|stage_numb?_")
_INDICES = re.compile(r"ind(ices|exes|ex)$|_idxs?$|_layers$|_blocks$")
_POSITIONS = re.compile(
    r"^max_(position_embeddings|(source|target)_positions|seq_len(gth)?)$|^n_(positions|ctx)$"
    r"|^context_length$"
)
_VOCABULARY = re.compile(r"vocab(ulary)?_size$|n_vocab|^vocab$")
_TOKEN = re.compile(r"token_id$|token_index$|^(pad|bos|eos|unk|mask)_index$")


class Level(NamedTuple):
    """What is made smaller, and whether fields that a config leaves open are filled in."""

    layers: bool = False
    positions: bool = False
    vocabulary: bool = False
    widths: bool = False
    completed: bool = False

    def __str__(self) -> str:
        return ", ".join(name for name, is_on in self._asdict().items() if is_on) or "nothing"


LEVELS = (
    Level(layers=True, positions=True, vocabulary=True, widths=True),
    Level(layers=True, positions=True, vocabulary=True, widths=True, completed=True),
    Level(layers=True, positions=True, vocabulary=True),
    Level(layers=True),
    Level(),
)
"""Tried in this order: not every config can be cut by the names of its fields."""


def shrink(config: Mapping[str, Any], level: Level) -> Fields:
    """Return the fields of a config made smaller; nested configs too."""
    small: Fields = _copied(config)
    if level.completed:
        for part in _parts(small):
            _complete(part)
    if level.widths:
        _divide(small, _factor(small))
    if level.layers:
        for part in _parts(small):
            _cut_layers(part)
    if level.positions:
        for part in _parts(small):
            for name, value in part.items():
                if _POSITIONS.search(name) and _whole(value):
                    part[name] = min(value, POSITIONS)
    if level.vocabulary:
        _cut_vocabulary(small)
    return small


def merged(config: Mapping[str, Any], stated: Mapping[str, Any]) -> Fields:
    """Return a config with some fields stated; those of nested configs one by one."""
    fields = dict(config)
    for name, value in stated.items():
        inner = fields.get(name)
        if isinstance(inner, Mapping) and isinstance(value, Mapping):
            value = merged(inner, value)
        fields[name] = value
    return fields


def _copied(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _copied(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_copied(part) for part in value]
    return value


def _parts(config: Fields) -> Iterator[Fields]:
    """Yield a config and those nested in it; what has other keys than names is a table."""
    yield config
    for value in config.values():
        if isinstance(value, dict) and all(isinstance(name, str) for name in value):
            yield from _parts(value)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _numbers(value: Any) -> list[int]:
    if _whole(value):
        return [value]
    if isinstance(value, list):
        return [number for part in value for number in _numbers(part)]
    return []


def _is_width(name: str) -> bool:
    return bool(_WIDTH.search(name)) and not _NO_WIDTH.search(name)


def _is_heads(name: str) -> bool:
    return bool(_HEADS.search(name)) and not _NO_HEADS.search(name)


def _factor(config: Fields) -> int:
    """Return the largest factor that divides every width and every count of heads."""
    factor = 0
    for part in _parts(config):
        for name, value in part.items():
            is_divided = _is_heads(name) and not _KEY_VALUE_HEADS.search(name)
            if is_divided or _is_width(name):
                factor = math.gcd(factor, *_numbers(value))
    return max((n for n in range(1, LARGEST_FACTOR + 1) if factor and factor % n == 0), default=1)


def _divide(config: Fields, factor: int) -> None:
    for part in _parts(config):
        for name, value in part.items():
            if _is_heads(name) and _KEY_VALUE_HEADS.search(name):
                part[name] = _mapped(value, lambda n: n // math.gcd(n, factor) if n > 0 else n)
            elif _is_heads(name) or _is_width(name):
                part[name] = _mapped(value, lambda n: n // factor)


def _mapped(value: Any, function: Any) -> Any:
    if isinstance(value, list):
        return [_mapped(part, function) for part in value]
    return function(value) if _whole(value) else value


def _complete(config: Fields) -> None:
    """Fill in what models need and some default configs leave open."""
    heads = config.get("num_attention_heads") or config.get("num_heads")
    width = config.get("hidden_size")
    if isinstance(heads, int) and isinstance(width, int):
        _fill(config, head_dim=width // heads, num_key_value_heads=heads)
    _fill(config, prediction_length=24, vocab_size=VOCABULARY, pad_token_id=0)
    _fill(config, image_token_id=VOCABULARY - 1, image_token_index=VOCABULARY - 1)
    _fill(config, video_token_id=VOCABULARY - 2, video_token_index=VOCABULARY - 2)
    _fill(config, n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=2)


def _fill(config: Fields, **values: Any) -> None:
    for name, value in values.items():
        if name in config and config[name] is None:
            config[name] = value


def _cut_layers(config: Fields) -> None:
    """Cut counts of layers, and with them what there is one of for each layer."""
    for name, value in config.items():
        if isinstance(value, list) and _STAGES.search(name):
            config[name] = _mapped(value, lambda depth: min(depth, LAYERS))
    counts = {
        name: value
        for name, value in config.items()
        if _whole(value) and _LAYERS.search(name) and not _NO_LAYERS.search(name)
    }
    for name, old in counts.items():
        needed = [LAYERS]
        for field, value in config.items():
            if _is_of_layers(value, old):
                needed.append(_all_kinds(value))
            elif _is_of_indices(field, value, old):
                needed.append(len(value))
            elif field.endswith("_layer_offset") and _whole(value):
                needed.append(value + 1)  # the first layer of its kind
        new = min(max(needed), old)
        if new < old:
            config[name] = new
            _cut_lists(config, old, new)


def _is_of_layers(value: Any, layers: int) -> bool:
    """Say whether a list has an entry for each layer."""
    return isinstance(value, list) and len(value) == layers > LAYERS


def _is_of_indices(name: str, value: Any, layers: int) -> bool:
    """Say whether a list names some layers by their places."""
    is_named = isinstance(value, list) and bool(_INDICES.search(name)) and len(value) != layers
    return is_named and bool(value) and all(map(_whole, value))


def _cut_lists(config: Fields, old: int, new: int) -> None:
    """Fit what belongs to layers to fewer of them."""
    for name, value in config.items():
        if _is_of_layers(value, old):
            config[name] = value[:new]
        elif _is_of_indices(name, value, old):
            config[name] = _remapped(value, old, new)
        elif isinstance(value, dict) and name.startswith("per_layer"):
            config[name] = {key: part for key, part in value.items() if int(key) < new}
    names = config.get("stage_names")
    if isinstance(names, list) and len(names) == old + 1:  # a stage for each layer
        for name in ("stage_names", "out_features"):  # follow from the indices
            config.pop(name, None)


def _all_kinds(values: list[Any]) -> int:
    """Return the length of the shortest beginning that holds every value of a list."""
    if not all(isinstance(value, (str, int)) for value in values) or len(set(values)) > 6:
        return 0
    return max(values.index(kind) for kind in set(values)) + 1


def _remapped(indices: list[int], old: int, new: int) -> list[int]:
    """Move indices of layers into fewer layers, in the same order."""
    if max(indices) < new:
        return indices
    last = new if max(indices) >= old else new - 1
    kept = sorted(set(indices))
    return [max(last - (len(kept) - 1 - kept.index(index)), 0) for index in indices]


def _cut_vocabulary(config: Fields) -> None:
    """Cut every vocabulary, and move special tokens beyond its end to its last places."""
    parts = list(_parts(config))
    large = sorted(
        {
            value
            for part in parts
            for name, value in part.items()
            if _TOKEN.search(name) and _whole(value) and value >= VOCABULARY
        }
    )
    moved = {token: VOCABULARY - len(large) + place for place, token in enumerate(large)}
    for part in parts:
        for name, value in part.items():
            if _VOCABULARY.search(name) and _whole(value):
                part[name] = min(value, VOCABULARY)
            elif _TOKEN.search(name):
                part[name] = _mapped(value, lambda n: moved.get(n, n))
