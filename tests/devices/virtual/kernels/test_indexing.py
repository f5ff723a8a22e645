"""Indexing takes the scratch that PyTorch's CUDA code takes on a simulated runtime."""

from __future__ import annotations

import pytest
import torch

from autobatch.devices.virtual.kernels.indexing import indexing_scratch
from autobatch.gpus.catalogue import find_gpu
from autobatch.memory.scratch import RESULT, RESULTS

aten = torch.ops.aten
GPU = find_gpu("a100-40gb")


def scratch(func, *args, **kwargs):
    return list(indexing_scratch(func, args, kwargs, GPU))


def floats(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def indices(*shape, dtype=torch.int64):
    return torch.empty(shape, dtype=dtype, device="meta")


def test_the_gradient_of_an_embedding_sorts_from_3073_indices_on():
    backward = aten.embedding_dense_backward.default
    assert scratch(backward, floats(3072, 64), indices(3072), 1000, -1, False) == []
    n, rows = 8192 * 8, 1000 * 8
    assert scratch(backward, floats(8192, 64), indices(8192), 1000, -1, False) == [
        *(n, n, n, 138751, ~3, ~2),
        RESULT,
        *(n, 8, n, ~6, rows, rows, 8, 14552, 465664),
    ]


def test_a_large_vocabulary_has_a_part_for_every_index():
    steps = scratch(
        aten.embedding_dense_backward.default,
        floats(8192, 768, dtype=torch.bfloat16),
        indices(8192),
        50257,
        -1,
        False,
    )
    assert steps[-1] == 27681792  # in fp32


def test_indices_and_gradients_that_are_not_contiguous_are_copied():
    expanded = indices(1, 204).expand(4, 204)
    gradient = floats(204, 4, 64).transpose(0, 1)
    backward = aten.embedding_dense_backward.default
    assert scratch(backward, gradient, expanded, 1000, -1, False) == [6528, 208896]
    assert scratch(aten.embedding.default, floats(1000, 64), indices(1, 512).expand(2, 512)) == [
        8192
    ]
    assert scratch(aten.embedding.default, floats(1000, 64), indices(512)) == []


@pytest.mark.parametrize(
    ("pair", "taken"),
    [
        ((indices(5), indices(5)), []),
        ((indices(8, 1), indices(1, 5)), [320, 320]),
        ((indices(1).expand(5), indices(5)), [40]),
        ((None, indices(5)), []),
    ],
    ids=["alike", "broadcast", "expanded", "one"],
)
def test_indices_that_differ_in_layout_are_copied(pair, taken):
    assert scratch(aten.index.Tensor, floats(8, 128, 64), list(pair)) == taken


def test_adding_to_indexed_places_sorts_them():
    table, places, values = floats(169, 3), indices(4900), floats(4900, 3)
    n = 4900 * 8
    steps = scratch(aten._index_put_impl_.default, table, [places], values, True, True)
    assert steps[:-1] == [RESULTS, n, n, ~1, n, n, n]
    assert scratch(aten._index_put_impl_.default, table, [places], values, False, True) == []


def test_sorts_and_running_sums():
    assert scratch(aten.sort.default, floats(8, 1024)) == [RESULTS, 8192]
    assert scratch(aten.sort.default, floats(10**6)) == [RESULTS, 8 * 10**6, 12342527]
    assert scratch(aten.cumsum.default, indices(8, 1024), -1) == []
    assert scratch(aten.cumsum.default, floats(8, 1024, dtype=torch.bool), -1) == [RESULTS, 65536]
