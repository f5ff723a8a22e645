"""Reductions take the scratch that an H200 was measured to take (reports.hardware.convolutions)."""

from __future__ import annotations

import pytest
import torch

from autobatch.devices.virtual.kernels.reductions import reduction_scratch, sum_over_rows
from autobatch.gpus.catalogue import find_gpu

aten = torch.ops.aten
H200 = find_gpu("h200")
BF16, FP32 = torch.bfloat16, torch.float32
SUM, SUM_ALL, AMAX = aten.sum.dim_IntList, aten.sum.default, aten.amax.default


def sizes(steps) -> list[int]:
    return [step for step in steps if isinstance(step, int)]


def scratch(func, shape, dtype, *args, gpu=H200, **kwargs) -> list[int]:
    data = torch.empty(shape, dtype=dtype, device="meta")
    return sizes(reduction_scratch(func, (data, *args), kwargs, gpu))


@pytest.mark.parametrize(
    ("shape", "dtype", "measured"),
    [
        ((512, 768), FP32, []),
        ((2048, 768), FP32, [12582912, 24]),
        ((8192, 768), BF16, [50331648, 24]),
        ((19072, 768), FP32, [117178368, 24]),
        ((65536, 3072), BF16, [138412032, 96]),
        ((4096, 11008), BF16, [140902400, 344]),
        ((16384, 10), FP32, [5120, 8]),
        ((4096, 10), FP32, []),
        ((8192, 50257), FP32, []),
    ],
)
def test_a_sum_over_rows_takes_what_was_measured(shape, dtype, measured):
    assert scratch(SUM, shape, dtype, [0]) == measured


@pytest.mark.parametrize(
    ("func", "shape", "dtype", "measured"),
    [
        (SUM_ALL, (2048, 768), FP32, [768, 4]),
        (aten.mean.default, (8192, 768), BF16, [2112, 4]),
        (aten.linalg_vector_norm.default, (4096, 50257), FP32, [6284, 4]),
        (SUM_ALL, (2048, 10), FP32, []),
    ],
)
def test_a_sum_of_all_elements_takes_what_was_measured(func, shape, dtype, measured):
    assert scratch(func, shape, dtype) == measured


def test_extrema_of_halves_are_compared_in_halves():
    assert scratch(AMAX, (8192, 768), BF16, [0]) == [25165824, 24]
    data = torch.empty(8192, 768, dtype=BF16, device="meta")
    steps = reduction_scratch(SUM, (data, [0]), {"dtype": FP32}, H200)
    assert steps == ["results", 50331648, 24]  # after the result


def test_what_32_bits_cannot_index_is_summed_in_two_halves():
    assert scratch(SUM_ALL, (19072, 50257), FP32) == [14628, 4, 14628, 4]


def test_fewer_multiprocessors_split_the_work_less():
    on_t4 = scratch(SUM, (4096, 3072), FP32, [0], gpu=find_gpu("t4"))
    assert on_t4 == [4 * 3072 * 14 * 128, 96]  # 40 multiprocessors for 24 blocks of outputs


def test_a_sum_along_rows_takes_nothing():
    assert scratch(SUM, (8192, 768), FP32, [1]) == []


def test_counting_copies_booleans_to_int64_first():
    assert scratch(SUM_ALL, (64, 16), torch.bool)[0] == 64 * 16 * 8


def test_norms_of_many_tensors_keep_a_number_for_each_chunk():
    matrix = torch.empty(19072, 3072, device="meta")
    steps = reduction_scratch(aten._foreach_norm.Scalar, ([matrix, matrix[0]], 2), {}, H200)
    assert steps == [7152]  # before the results


def test_a_sum_over_the_rows_of_a_matrix_may_be_asked_for_by_shape():
    steps = scratch(SUM, (8192, 768), BF16, [0])
    assert sum_over_rows(8192, 768, BF16, H200) == steps


def test_sums_of_what_no_card_holds_take_as_few_pieces_as_those_of_two_tebibytes():
    def pieces(rows):
        return sum_over_rows(rows, 2048, torch.float32, find_gpu("t4"))

    exact = pieces(2**27)  # a tebibyte
    for times in (2**10, 2**20):
        many = pieces(2**27 * times)
        assert len(many) <= 4 * len(exact)
        assert sum(many) == times * sum(exact)
