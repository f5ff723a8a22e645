"""`python -m reports.fidelity` compares what it says it compares."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from autobatch.memory.trace import Allocation, Mark, Trace
from reports.fidelity.__main__ import compare_rows
from reports.fidelity.differences import difference, sequence
from reports.fidelity.results import errors, is_near, summarise
from reports.fidelity.rows import CARDS, Row, rows
from reports.fidelity.subjects import NotBuiltError, workload
from reports.fidelity.text import write_results
from tests.bench.card import reason_it_cannot_run


def trace(*sizes: int) -> Trace:
    return Trace(
        micro_batch=2,
        accumulation_steps=1,
        blocks=tuple(Allocation(n, "temporaries", "forward", f"op{n}") for n in sizes),
        events=tuple(range(len(sizes))),
        marks=(Mark(0, "forward", 0, 0),),
    )


def test_every_combination_comes_as_often():
    found = list(rows([f"m{n}" for n in range(48)], 2))
    assert len({row.key for row in found}) == len(found) == 96
    counts = Counter((r.gpu, r.micro_batch, r.precision, r.checkpointing) for r in found)
    assert len(counts) == 24
    assert set(counts.values()) == {4}


def test_what_only_one_side_allocates_is_named_with_its_bytes_at_the_peak():
    found = difference(trace(1024, 4096, 2048), trace(1024, 2048, 8192))
    assert (found["same"], found["only_bench"], found["only_predicted"]) == (2, 1, 1)
    assert found["first"] == "bench: op4096, 4,096 B, forward"
    assert (
        found["kinds"][0] | {"side": "predicted", "size_bytes": 8192, "at_peak": 1}
        == found["kinds"][0]
    )
    assert any(line.startswith("bench") for line in sequence(trace(1024), trace()))


def record(bench: tuple[int, int], predicted: tuple[int, int]) -> dict:
    return {
        **Row("recurrent:gru").task(),
        "key": "a",
        "outcome": "compared",
        "bench_bytes": list(bench),
        "predicted_bytes": list(predicted),
        "difference": difference(trace(1024), trace(1024)),
    }


def test_a_row_is_near_where_both_peaks_are(tmp_path):
    near, far = (
        record((10_000, 20_000), (10_004, 20_000)),
        record((10_000, 20_000), (10_000, 20_100)),
    )
    assert is_near(near)
    assert not is_near(far)
    assert errors(far) == (0.0, 0.005)
    counts = summarise([near, far, {**far, "outcome": "failed", "reasons": {}}])
    assert (counts["near"], counts["compared"], counts["failed"], counts["worst"]) == (
        1,
        2,
        1,
        0.005,
    )
    text = write_results([near, far], tmp_path)
    assert "1 (50.0%) have allocated and reserved peaks within 0.05 %" in text
    assert "order of frees" in text
    assert json.loads((tmp_path / "results.json").read_text())["near"] == 1


@pytest.mark.slow
def test_models_are_built_alike_on_both_sides_and_convolutions_are_left_out():
    on_cpu, on_meta = (workload("recurrent:gru", device=device) for device in ("cpu", "meta"))
    shapes = [[tuple(p.shape) for p in what.model.parameters()] for what in (on_cpu, on_meta)]
    assert shapes[0] == shapes[1]
    assert all(p.is_meta for p in on_meta.model.parameters())
    with pytest.raises(NotBuiltError, match="no activation checkpointing"):
        workload("recurrent:gru", checkpointing=True)


@pytest.mark.slow
@pytest.mark.skipif(reason_it_cannot_run() is not None, reason=str(reason_it_cannot_run()))
def test_a_recurrent_network_is_predicted_to_the_byte(tmp_path):
    row = Row("recurrent:lstm-bidirectional", gpu=CARDS[0], precision="bf16")
    (found,) = compare_rows([row], tmp_path / "rows.jsonl", workers=1).values()
    assert found["outcome"] == "compared", found
    assert is_near(found)
