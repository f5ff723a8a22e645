"""Inputs of any module, guessed from its first layer and kept only where a dry run succeeds."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from torch import nn

from autobatch.workload.infer.dry_run import first_that_runs
from autobatch.workload.infer.fields import (
    Field,
    Fields,
    Inferred,
    builder,
    describe,
    float_dtype,
    unknown,
)
from autobatch.workload.infer.images import HEAD_LAYERS
from autobatch.workload.infer.signature import required_arguments

__all__ = ["TOKENS", "infer_plain", "position_tables"]

# Length of a sequence where nothing says more.
TOKENS = 128

# Sizes tried for a plain convolution, the usual ones first; the first that runs is taken.
LENGTHS = ((1024,), (128,), (16_000,), (256,), (512,), (2048,), (100,), (64,), (32,))
SIDES = (224, 32, 28, 64, 96, 128, 256, 299, 512, 384, 84, 48, 16, 8)
IMAGES = tuple((side, side) for side in SIDES)
VOLUMES = ((16, 112, 112), *((side, side, side) for side in (64, 32, 96, 128, 16)))

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
# Names of tables of position embeddings.
POSITIONS = re.compile(r"pos|wpe")


def infer_plain(model: nn.Module, seq: int | None, image_size: int | None) -> Inferred:
    """Return the likeliest inputs of the first layer on which the whole model runs.

    Raises:
        SampleError: there is no such layer, or the model takes more than one argument.
    """
    required = required_arguments(model.forward)
    if len(required) > 1:
        raise unknown(model, f"forward takes {', '.join(required)}")
    first = next((m for m in model.modules() if isinstance(m, FIRST_LAYERS)), None)
    if first is None:
        raise unknown(model, "no layer tells what it takes")
    fields, _ = first_that_runs(model, _plain_candidates(model, first, seq, image_size))
    layer = type(first).__name__
    return Inferred(
        batch=builder(fields),
        inputs_note=f"inputs inferred: {describe(fields)} from the first layer ({layer})",
    )


def _plain_candidates(
    model: nn.Module, first: nn.Module, seq: int | None, image_size: int | None
) -> list[Fields]:
    """Return inputs that a model with this first layer may take, the likeliest first."""
    dtype = float_dtype(model)
    layers = [m for m in model.modules() if isinstance(m, SEQUENCE_LAYERS)]
    batch_dim = 1 if any(not layer.batch_first for layer in layers) else 0
    tokens = seq or min([TOKENS, *(table.num_embeddings for table in position_tables(model))])

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
            # These layers would take lone rows for one sequence without a batch.
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


def position_tables(model: nn.Module) -> Iterator[nn.Embedding]:
    """Yield the tables of position embeddings, by their names."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and POSITIONS.search(name.rpartition(".")[2]):
            yield module
