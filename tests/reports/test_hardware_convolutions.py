"""`python -m reports.hardware.convolutions`: every row without data, some on a card on the CPU."""

import json
import sys
import textwrap
import time

import pytest
import torch

from autobatch.errors import AutobatchError
from autobatch.support.units import MIB
from reports.hardware import convolutions
from reports.hardware.contexts import contexts
from reports.hardware.convolution_layers import COMMON, RARE, SPECIAL, square
from reports.hardware.convolutions import convolution, grid
from reports.hardware.kernels import Row, kernels, record
from reports.hardware.render import load
from tests.support import ROOT
from tests.support.cuda_on_cpu import CudaOnCpu

SMALL = square("small", 4, 6, 3, 8)


@pytest.fixture(autouse=True)
def _cudnn_flags():
    cudnn = torch.backends.cudnn
    before = cudnn.allow_tf32, cudnn.benchmark
    yield
    cudnn.allow_tf32, cudnn.benchmark = before


def recorded(rows, card=None, seconds=60):
    kept = []
    record(rows, card or CudaOnCpu(), kept.append, time.monotonic() + seconds)
    return kept


def ends(op):
    return [end for _, end in op["allocations"]]


# The grid


def test_every_row_of_the_grid_runs_without_data_and_has_the_output_that_it_says():
    def play(name, op):
        result = op()
        if name == "forward":
            assert list(result.shape) == row.facts["output"]
        return result

    rows = list(grid())
    for row in {
        json.dumps(row.facts["layer"]) + str(row.facts["input"]): row for row in rows
    }.values():
        row.run(play, torch.device("meta"))
    assert {row.facts["layer"] for row in rows} >= {layer.name for layer in (*COMMON, *SPECIAL)}
    assert len(rows) > 1000
    first = rows[: 4 * len(COMMON)]
    assert {row.facts["batch"] for row in first} == {32, 2}
    assert {row.facts["dtype"] for row in first} == {"tf32", "bf16"}


def test_no_row_is_in_the_grid_twice():
    rows = [json.dumps(row.facts) for row in grid()]
    assert len(set(rows)) == len(rows)


def test_a_layer_that_is_too_large_and_a_format_that_is_none_are_left_out():
    assert convolution(square("huge", 1024, 1024, 3, 1024), 128, "fp32") is None
    assert all(convolution(layer, 2, "bf16") is not None for layer in (*COMMON, *SPECIAL, *RARE))
    line = next(layer for layer in SPECIAL if len(layer.kernel) == 1)
    assert convolution(line, 2, "bf16", channels_last=True) is None


@pytest.mark.parametrize(
    "row", {r.facts["op"]: r for r in kernels()}.values(), ids=lambda r: r.facts["op"]
)
def test_each_kind_of_kernel_runs_without_data(row):
    names = []

    def play(name, op):
        names.append(name)
        return op()

    row.run(play, torch.device("meta"))
    assert names and len(set(names)) == len(names)


# What is recorded


def test_the_allocations_of_a_convolution_are_its_outputs_and_its_workspace():
    def workspace(name, shapes):
        return 3 * MIB if name == "aten::convolution" else 0

    (row,) = recorded([convolution(SMALL, 2, "tf32")], CudaOnCpu(scratch=workspace))
    assert row["error"] is None
    assert list(row["ops"]) == ["forward", "data_gradient", "weight_gradient", "both"]
    out, data, weight = 2 * 6 * 8 * 8 * 4, 2 * 4 * 8 * 8 * 4, 6 * 4 * 9 * 4
    forward, both = row["ops"]["forward"], row["ops"]["both"]
    assert forward["allocations"] == [(out, "output 0"), (3 * MIB, "freed")]
    assert forward["peak_bytes"] >= out + 3 * MIB
    assert "first" not in forward
    assert both["allocations"] == [(data, "output 0"), (weight, "output 1")]
    assert [o["shape"] for o in both["outputs"]] == [[2, 4, 8, 8], [6, 4, 3, 3]]


def test_channels_last_shows_in_the_strides():
    (row,) = recorded([convolution(SMALL, 2, "tf32", channels_last=True)])
    assert row["ops"]["forward"]["outputs"][0]["stride"] == [384, 1, 48, 6]


def test_what_an_op_keeps_and_a_first_call_that_differs_are_told():
    held = []

    def op():
        if not held:
            held.append(torch.empty(1000))
        held.append(torch.empty(500))
        return torch.empty(100)

    (row,) = recorded([Row({"op": "keeps"}, lambda play, device: play("op", op))])
    assert row["ops"]["op"]["allocations"] == [(2000, "kept"), (400, "output 0")]
    assert [size for size, _ in row["ops"]["op"]["first"]] == [4000, 2000, 400]


def test_a_row_that_fails_keeps_its_error_and_what_it_had():
    def broken(play, device):
        play("fine", lambda: torch.empty(100))
        raise RuntimeError("no such engine")

    rows = recorded([Row({"op": "broken"}, broken), convolution(SMALL, 1, "bf16")])
    assert rows[0]["error"] == "RuntimeError: no such engine"
    assert ends(rows[0]["ops"]["fine"]) == ["output 0"]
    assert rows[1]["error"] is None


def test_a_card_that_no_longer_answers_ends_the_part():
    def broken(play, device):
        raise RuntimeError("illegal memory access")

    assert len(recorded(Row({"op": str(n)}, broken) for n in range(1000))) == 15


def test_without_a_history_peaks_and_outputs_are_still_recorded():
    class Forgetful(CudaOnCpu):
        def snapshot(self):
            raise AutobatchError("not today")

    rows = recorded([convolution(SMALL, n, "tf32") for n in range(1, 50)], Forgetful())
    assert len(rows) == 49
    assert rows[0]["error"] == "AutobatchError: not today"
    assert rows[0]["ops"]["forward"]["allocations"] is None
    assert rows[0]["ops"]["forward"]["outputs"][0]["bytes"] == 6 * 64 * 4


def test_nothing_is_begun_after_the_deadline():
    assert recorded([convolution(SMALL, 1, "bf16")], seconds=-1) == []


@pytest.mark.filterwarnings("ignore")  # sparse tensors in CSR are new
def test_steps_of_the_context_are_read_one_after_the_other():
    used, kept = iter(range(100, 1000, 10)), []
    contexts(torch.device("cpu"), lambda: next(used), lambda: 5, kept.append, 90)
    assert [row["step"] for row in kept[:3]] == ["before anything", "context", "elementwise"]
    assert [row["delta_bytes"] for row in kept[1:4]] == [5, 10, 10]
    failed = {row["step"] for row in kept[1:] if row["error"]}
    assert {"matmul fp32", "convolution bf16", "AdamW fused", "fft", "svd", "sparse mm"}.isdisjoint(
        failed
    )
    assert "NCCL, one rank" in failed or torch.cuda.is_available()


# The command

CHILD = """
    import os, sys
    from pathlib import Path
    import torch
    from reports.hardware import convolutions, kernels
    from reports.hardware.bench import Bench, PeakWatch
    from reports.hardware.convolution_layers import square
    from tests.support.cuda_on_cpu import CudaOnCpu

    torch.set_num_threads(1)
    if sys.argv[1] == BROKEN:
        os._exit(3)
    small = square("small", 4, 6, 3, 8)
    convolutions.grid = lambda: [convolutions.convolution(small, n, "bf16") for n in (1, 2)]
    convolutions.kernels = lambda: [kernels.Row({"op": "x"}, lambda play, device: play(
        "y", lambda: torch.empty(7)))]
    bench = Bench(card=CudaOnCpu(), watch=PeakWatch(lambda: None))
    opened = lambda: (bench, lambda: 1)
    os._exit(convolutions.child(sys.argv[1], Path(sys.argv[2]), open_card=opened))
"""


@pytest.mark.slow
@pytest.mark.parametrize("broken", [None, "contexts"])
def test_all_parts_come_into_one_file(tmp_path, monkeypatch, broken):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    script = tmp_path / "child.py"
    script.write_text(f"BROKEN = {broken!r}\n" + textwrap.dedent(CHILD))
    path = convolutions.measure_all((sys.executable, str(script)), tmp_path / "out", 100, "words")
    assert [file.name for file in (tmp_path / "out").iterdir()] == [path.name]
    assert path.name.startswith("rehearsed-torch") and path.name.endswith("-convolutions.json")
    assert load(path.parent) == {}  # the tables of workloads are made without it
    document = json.loads(path.read_text())
    assert document["evidence"] == "measured" and document["device"]["compute_capability"] == [8, 0]
    assert document["command"] == "words"
    assert [row["batch"] for row in document["convolutions"]] == [1, 2]
    assert document["kernels"][0]["ops"]["y"]["allocations"] == [[28, "output 0"]]
    parts = ["contexts", "kernels", "convolutions"]
    assert document["finished"] == [part for part in parts if part != broken]
    assert bool(document["contexts"]) is (broken is None)
    assert document["exit_codes"]["contexts"] == (3 if broken else 0)
