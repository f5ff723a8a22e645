"""Triton's kernels are compiled for the card, and their launches are accepted."""

from __future__ import annotations

import pytest

from tests.bench.children import answer, needs_bench

pytestmark = needs_bench


@pytest.mark.slow
def test_a_triton_kernel_and_a_compiled_model_run(tmp_path) -> None:
    pytest.importorskip("triton")
    caches = {
        "TRITON_CACHE_DIR": str(tmp_path / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }
    found = answer("compiled", variables=caches)
    assert found["learned"] == [True] * 6
    assert found["peak"] > 2 * 8519680  # the workspaces of cuBLAS
