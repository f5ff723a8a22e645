"""`python -m reports.hardware`: on the virtual GPU, on a card played on the CPU, on a real one."""

import io
import json
import shutil
import subprocess
import sys
import time
import warnings
import zipfile
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from autobatch import Workload, find_gpu
from autobatch.devices.cuda.gpu import describe
from autobatch.devices.virtual.gpu import VirtualGpu
from autobatch.memory.trace import Allocation, Mark, Trace
from autobatch.support.units import MIB
from reports.common.alignment import align, summary
from reports.hardware import __main__ as command
from reports.hardware import child, rivals
from reports.hardware.bench import Bench, PeakWatch
from reports.hardware.findings import Findings
from reports.hardware.jobs import run_jobs
from reports.hardware.measure import PlainTraining, measure, run_plain
from reports.hardware.render import NOTHING, load, render, section
from reports.hardware.simulate import simulate_again
from reports.hardware.virtual import simulate_all
from reports.hardware.workloads import CASES, Case, classify, find_case, momentum
from tests.support import ROOT
from tests.support.cuda_on_cpu import CudaOnCpu

LIMIT_BYTES = 64 * MIB
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU here")


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    """Tiny models gain nothing from more, and wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield
    torch.set_num_threads(threads)


each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


# Workloads


@pytest.mark.slow
@each_case
def test_a_model_has_the_parameters_of_the_published_one_and_runs_on_the_virtual_gpu(case):
    with torch.device("meta"):
        workload = case.make()
    assert sum(p.numel() for p in workload.model.parameters()) == case.parameters
    gpu = VirtualGpu(find_gpu("h100-80gb"))
    run = gpu.run(workload, micro_batch=2, accumulation_steps=1)
    assert run.replay.peak_allocated_bytes > 8 * case.parameters
    assert run.notes == ()


@each_case
def test_a_small_model_of_the_same_kind_learns_on_the_cpu(case):
    workload = replace(case.make(**case.small), autocast=None)
    training = PlainTraining(workload, torch.device("cpu"))
    training.windows(2, 1)
    parameters = list(training.model.parameters())
    assert all(p.isfinite().all() for p in parameters)
    assert len(training.optimizer.state) == len(parameters)  # each one had a gradient


def test_names_are_one_file_name_each_and_some_limits_are_tight():
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names) == 16
    assert all(name.replace("-", "").isalnum() for name in names)
    assert {case.limit_bytes for case in CASES} >= {None, 8 * 1024 * MIB, 16 * 1024 * MIB}
    assert 2 <= sum(case.compares for case in CASES) <= 5
    assert sum(case.times_recording for case in CASES) == 2


# Alignment


def trace(sizes, phase="forward", op="op"):
    """Blocks that are made one after the other, and freed at the end."""
    blocks = tuple(Allocation(size, "temporaries", phase, op) for size in sizes)
    numbers = range(len(blocks))
    events = (*numbers, *(~number for number in numbers))
    return Trace(
        micro_batch=2,
        accumulation_steps=1,
        blocks=blocks,
        events=events,
        marks=(Mark(0, phase, 0, 0),),
    )


def test_allocations_are_paired_in_order_by_their_rounded_size():
    real, virtual = trace([100, 5000, 700, 9000]), trace([512, 600, 9001, 4])
    found = align(real, virtual)
    assert found.pairs == ((0, 0), (2, 1), (3, 2))
    assert (found.only_real, found.only_virtual) == ((1,), (3,))


def test_allocations_of_different_phases_are_no_pair_and_empty_ones_do_not_count():
    real, virtual = trace([512, 0]), trace([512], phase="backward")
    found = align(real, virtual)
    assert (found.pairs, found.only_real, found.only_virtual) == ((), (0,), (0,))


def test_a_summary_names_the_ops_and_what_of_them_lives_at_the_peak():
    found = summary(trace([100, 5000, 5000], op="aten::conv"), trace([100], op="aten::mm"))
    assert (found["matched"], found["only_real"], found["only_virtual"]) == (1, 2, 0)
    assert found["only_real_bytes_at_peak"] == 10_000
    assert found["peak_bytes"] == 10_100
    [op] = found["only_real_ops"]
    assert (op["op"], op["count"], op["bytes"]) == ("aten::conv", 2, 10_000)
    assert found["only_virtual_ops"] == found["freed_elsewhere_ops"] == []


def test_a_pair_that_is_freed_in_different_phases_is_told():
    early = replace(trace([600]), events=(0, ~0))
    late = replace(early, marks=(Mark(0, "forward", 0, 0), Mark(1, "backward", 0, 0)))
    assert summary(early, early)["freed_elsewhere"] == 0
    assert summary(early, late)["freed_elsewhere"] == 1


SIZES = st.lists(st.integers(1, 3000), max_size=40)


@given(SIZES)
def test_a_trace_is_all_of_itself(sizes):
    one = trace(sizes)
    found = align(one, one)
    assert found.pairs == tuple((i, i) for i in range(len(sizes)))
    assert found.only_real == found.only_virtual == ()


@given(SIZES, st.data())
def test_what_is_taken_away_on_one_side_is_only_on_the_other(sizes, data):
    indices = st.sets(st.integers(0, max(len(sizes) - 1, 0)), max_size=len(sizes))
    gone = data.draw(indices if sizes else st.just(set()))
    less = trace([size for i, size in enumerate(sizes) if i not in gone])
    found = align(trace(sizes), less)
    assert (len(found.only_real), found.only_virtual) == (len(gone), ())


# The whole command, on a card that is played


def tiny_cnn():
    return Workload(
        model=nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(8),
            nn.Flatten(), nn.Linear(1024, 10),
        ),
        batch=lambda n: (torch.rand(n, 3, 32, 32), torch.randint(10, (n,))),
        loss=classify,
        optimizer=momentum,
    )  # fmt: skip


def tiny_mlp():
    return Workload(
        model=nn.Sequential(nn.Linear(16, 8192), nn.GELU(), nn.Linear(8192, 10)),
        batch=lambda n: (torch.rand(n, 16), torch.randint(10, (n,))),
        loss=classify,
    )


def tiny(name, make, **options):
    given = {"what": "tiny", "parameters": 1, "limit_bytes": LIMIT_BYTES}
    return Case(name=name, make=make, **given | options)


TINY = {
    "cnn": tiny("cnn", tiny_cnn, compares=True, times_recording=True),
    "mlp": tiny("mlp", tiny_mlp),
}


def rehearsed(limit_bytes=LIMIT_BYTES, **options):
    card = CudaOnCpu(allowed_bytes=limit_bytes, **options)
    watch = PeakWatch(lambda: None)
    return Bench(card=card, watch=watch, limited=card.recording, accelerator="cpu"), limit_bytes


def rehearsed_child(arguments):
    rivals.installed_version = lambda package: None  # importing them takes seconds
    return child.main(arguments, find=TINY.__getitem__, opened=rehearsed)


PLAYED = (
    sys.executable,
    "-c",
    f"import sys; sys.path.insert(0, {str(ROOT)!r}); import tests.reports.test_hardware as t; "
    "sys.exit(t.rehearsed_child(sys.argv[1:]))",
)


@pytest.fixture
def measured(tmp_path):
    """Measure a tiny workload in this process; return the facts, and the real trace."""

    def run(name, **options):
        bench, limit_bytes = rehearsed(**options)
        findings = Findings(tmp_path / f"measure-{name}.json")
        findings["card"] = bench.facts()
        findings["limit_bytes"] = limit_bytes
        case = TINY[name]
        traces = child.traces_folder(tmp_path, name)
        traces.mkdir()
        measure(case.make(), bench, findings, traces=traces, times_recording=case.times_recording)
        assert findings["errors"] == []
        return json.loads(findings.path.read_text())

    return run


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_a_workload_is_measured_whole_and_the_virtual_gpu_set_beside_it(name, measured, tmp_path):
    facts = measured(name)
    ceiling, proof = facts["ceiling"], facts["proof"]
    assert (ceiling["confirmed"], ceiling["limit_reached"]) == (True, False)
    # a CPU takes other scratch than the simulation of a card foresees
    assert ceiling["executions"] <= 4 and ceiling["ooms"] <= 1
    assert (proof["micro_batch"], proof["fits"]) == (ceiling["micro_batch"] + 1, False)
    stages = {trial["stage"] for trial in facts["trials"]}
    assert stages == {"ceiling", "proof", "small", "middle"}
    extrapolated = facts["extrapolation"]
    assert extrapolated["aligned"] and extrapolated["reason"] is None
    largest = extrapolated["sizes"][-1]  # a size that needed a retry is none to compare
    assert largest["micro_batch"] == ceiling["micro_batch"]
    assert largest["foretold"] == largest["measured"] == largest["replayed"]
    footprint = facts["footprint"]
    assert sum(footprint.values()) == largest["measured"]["allocated_bytes"]
    assert [row["micro_batch"] for row in facts["labelled"]] == [2, ceiling["micro_batch"] // 2]
    assert all(row["same_as_unlabelled"] and not row["without_op"] for row in facts["labelled"])
    if TINY[name].times_recording:
        assert facts["recording"]["window_seconds_on"] > 0
    real = child._real(tmp_path, name)
    assert [len(trace.blocks) for trace in real] == [row["blocks"] for row in facts["labelled"]]

    findings = Findings(tmp_path / "virtual.json")
    simulate_all(TINY[name].make(), facts, real, findings)
    assert findings["errors"] == []
    assert {size["micro_batch"] for size in findings["sizes"]} == {
        size["micro_batch"] for size in facts["extrapolation"]["sizes"]
    }
    assert findings["ceiling"]["micro_batch"] > 0
    for aligned, trace in zip(findings["alignments"], real, strict=True):
        assert aligned["matched"] > 30 and aligned["micro_batch"] == trace.micro_batch
        only_virtual = {op["op"] for op in aligned["only_virtual_ops"]}
        assert "cublas workspace" in only_virtual  # a CPU takes none


@pytest.mark.slow
def test_files_are_simulated_again_without_a_card(measured, tmp_path):
    traces, folder = tmp_path / "traces.zip", tmp_path / "files"
    folder.mkdir()
    facts = measured("mlp")
    stale = {"ceiling": {"micro_batch": -1}, "alignments": [{"micro_batch": 2}], "errors": []}
    row = {"name": "mlp", "measure": facts, "virtual": stale}
    file = folder / "card.json"
    file.write_text(json.dumps({"date": "2026-01-02", "workloads": [row]}))
    case = tiny("mlp", tiny_mlp)
    assert simulate_again(folder, None, say=str, find=lambda name: case) == 0
    (again,) = json.loads(file.read_text())["workloads"]
    assert again["measure"] == json.loads(json.dumps(facts))
    assert again["virtual"]["ceiling"]["micro_batch"] > 1
    assert again["virtual"]["torch"] == torch.__version__
    assert again["virtual"]["alignments"] == [{"date": "2026-01-02", "micro_batch": 2}]
    card = facts["card"]
    gpu = describe(card["name"], card["capacity_bytes"], tuple(card["compute_capability"]))
    run = VirtualGpu(gpu).run(case.make(), micro_batch=2, accumulation_steps=2)
    with zipfile.ZipFile(traces, "w") as archive:
        blocks = [[b.size_bytes, b.category, b.phase, b.op, b.stream] for b in run.trace.blocks]
        marks = [[m.event, m.phase, m.window, m.micro_batch] for m in run.trace.marks]
        content = {"micro_batch": 2, "accumulation_steps": 2, "blocks": blocks}
        content |= {"events": run.trace.events, "marks": marks}
        archive.writestr("mlp/labelled-2.json", json.dumps(content))
    assert simulate_again(folder, traces, say=str, find=lambda name: case) == 0
    (aligned,) = json.loads(file.read_text())["workloads"][0]["virtual"]["alignments"]
    assert aligned["matched"] == sum(b.size_bytes > 0 for b in run.trace.blocks)
    assert "date" not in aligned


@pytest.mark.slow
def test_a_ceiling_that_the_model_cannot_foretell_is_found_and_named(measured):
    def scratch(name, shapes):
        batch = shapes[0][0] if shapes and shapes[0] else 0
        return 6 * MIB if name == "aten::native_batch_norm" and batch > 30 else 0

    facts = measured("cnn", scratch=scratch)
    assert facts["ceiling"]["confirmed"]
    after_all = facts["proof"].get("ceiling_after_all")
    assert facts["proof"]["fits"] == (after_all is not None)


def test_a_stage_that_fails_is_named_and_the_next_one_runs(tmp_path):
    findings = Findings(tmp_path / "findings.json")
    with findings.stage("first"):
        raise ValueError("no such luck\nand more")
    with findings.stage("second"):
        findings["answer"] = 42
    saved = json.loads(findings.path.read_text())
    assert [(e["stage"], e["error"]) for e in saved["errors"]] == [
        ("first", "ValueError: no such luck")
    ]
    assert saved["answer"] == 42 and set(saved["stage_seconds"]) == {"first", "second"}
    assert findings.failed("first") and not findings.failed("second")


@pytest.mark.slow
def test_the_whole_command_on_a_tiny_workload(tmp_path):
    folder = tmp_path / "out"
    path = command.measure_all(
        [TINY["cnn"]],
        command=PLAYED,
        folder=folder,
        seconds=300,
        traces=tmp_path / "traces.zip",
        words="rehearsal",
    )
    document = json.loads(path.read_text())
    assert path.name == f"rehearsed-torch{torch.__version__.partition('+')[0]}.json"
    assert document["not_run"] == []
    assert not any(map(command._failed, document["workloads"]))
    [cnn] = document["workloads"]
    assert cnn["measure"]["ceiling"]["micro_batch"] and cnn["virtual"]["alignments"][0]["matched"]
    assert cnn["rivals"]["start"] == rivals.start_above(cnn["measure"]["ceiling"]["micro_batch"])
    assert (tmp_path / "traces.zip").stat().st_size > 1000

    readme = folder / "README.md"
    shutil.copy(command.FOLDER / "README.md", readme)
    render(folder)
    text = readme.read_text()
    assert "ceilings exact (n confirmed, n + 1 refuted): 1 of 1 proven ones" in text
    assert "within 0.5%, allocated and reserved: 1 of 1 aligned workloads" in text
    assert f"| cnn | 64.0 MiB | {cnn['measure']['ceiling']['micro_batch']:,} |" in text
    assert "#### Other finders" in text and "not installed" in text and NOTHING not in text
    assert "What is missing" not in text
    assert (folder / f"{path.stem}.svg").read_text().count("virtual, reserved") == 1
    render(folder)
    assert readme.read_text() == text


# Other finders


def lightning_modes():
    pytest.importorskip("lightning")
    return {"lightning power", "lightning binsearch"}


@pytest.mark.slow
def test_lightning_searches_with_the_same_window(tmp_path):
    names = lightning_modes()
    bench, _ = rehearsed(30 * MIB)
    findings = Findings(tmp_path / "rivals.json")
    # what a finder does, not how long it takes here
    rivals.compare(tiny_cnn(), bench, findings, ceiling=100, cap_s=600)
    assert findings["errors"] == []
    found = {finder["finder"]: finder for finder in findings["finders"]}
    for name in names:
        finder = found[name]
        assert finder["ending"] is None
        sizes = [row["micro_batch"] for row in finder["trials"]]
        assert sizes[:4] == [2, 4, 8, 16]
        assert finder["found"] in range(max(sizes) // 4, max(sizes))
        assert finder["ooms"] == sum(row["oom"] for row in finder["trials"]) > 0


@pytest.mark.slow
def test_accelerate_searches_with_the_same_window(tmp_path):
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    bench, _ = rehearsed()
    with bench.limited():
        tried = rivals.Tried(bench.card, 60)
        found = rivals.with_accelerate(tiny_cnn(), bench, tried, 1024)
    assert [row["oom"] for row in tried.rows] == [True] * (len(tried.rows) - 1) + [False]
    assert tried.rows[-1]["micro_batch"] == found


def downwards(function, starting_batch_size):
    """What accelerate's decorator does, in its oldest form."""

    def search(size=starting_batch_size):
        try:
            return function(size)
        except torch.OutOfMemoryError:
            pass
        return search(size // 2)

    return search


class FakeAccelerate:
    find_executable_batch_size = staticmethod(downwards)


def test_what_a_finder_tries_is_noted(monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate.utils", FakeAccelerate)
    monkeypatch.setitem(sys.modules, "accelerate", FakeAccelerate)
    bench, _ = rehearsed()
    search = partial(rivals.with_accelerate, tiny_cnn(), bench, start=2048)
    with bench.limited():
        outcome = rivals._outcome(lambda tried: search(tried), bench, cap_s=60)
    sizes = [row["micro_batch"] for row in outcome["trials"]]
    assert sizes == [2048 >> k for k in range(len(sizes))] and outcome["found"] == sizes[-1]
    assert outcome["ooms"] == len(sizes) - 1 >= 1 and outcome["ending"] is None


def test_a_finder_that_takes_too_long_is_cut_off():
    bench, _ = rehearsed()

    def endless(tried):
        for size in range(1, 10_000):
            with tried.window(size):
                time.sleep(0.01)

    outcome = rivals._outcome(endless, bench, cap_s=0.1)
    assert outcome["ending"].startswith("cut off") and outcome["found"] is None
    assert 1 < outcome["executions"] < 50


def test_a_finder_that_is_not_installed_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(rivals, "installed_version", lambda package: None)
    bench, _ = rehearsed()
    findings = Findings(tmp_path / "rivals.json")
    rivals.compare(tiny_mlp(), bench, findings, ceiling=10)
    assert [finder["version"] for finder in findings["finders"]] == [None] * 3


def test_plain_windows_are_those_of_the_probe():
    workload = tiny_mlp()
    model = tiny_mlp().model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run_plain(workload, model, optimizer, torch.device("cpu"), 4, 2)
    assert all(p.grad is None for p in model.parameters())


# Children


def script(body):
    return (sys.executable, "-c", f"import sys; kind, name, folder = sys.argv[1:]\n{body}")


def jobs(body, tmp_path, *, cases=("cnn",), seconds=60.0, said=None):
    return run_jobs(
        [replace(TINY[name], compares=False) for name in cases],
        command=script(body),
        folder=tmp_path,
        seconds=seconds,
        say=(said if said is not None else []).append,
        saved=lambda _: None,
    )


def test_a_child_that_dies_is_told_with_its_last_words(tmp_path):
    said = []
    found = jobs("sys.stdin.readline(); sys.exit('the card fell off')", tmp_path, said=said)
    [error] = found.found["cnn"]["measure"]["errors"]
    assert error["error"] == "the process ended with code 1"
    assert error["traceback"] == ["the card fell off"]
    assert said[0].startswith("measure cnn: ")


def test_a_child_that_hangs_is_ended_and_what_it_knew_is_kept(tmp_path, monkeypatch):
    monkeypatch.setitem(run_jobs.__globals__["JOB_S"], "measure", 1.0)
    body = """
sys.stdin.readline()
open(f"{folder}/{kind}-{name}.json", "w").write('{"stage": "proof", "errors": [], "ceiling": {}}')
import time; time.sleep(60)
"""
    found = jobs(body, tmp_path).found["cnn"]["measure"]
    assert found["ceiling"] == {} and "stage" not in found
    assert [(e["stage"], e["error"]) for e in found["errors"]] == [("proof", "ended after 1 s")]


def test_a_child_that_dies_while_it_gets_ready_is_told(tmp_path):
    found = jobs("sys.exit(3)", tmp_path, cases=("cnn", "mlp"))
    endings = [row["measure"]["errors"][0]["error"] for row in found.found.values()]
    assert endings == ["the process ended with code 3"] * 2


def test_what_time_does_not_allow_is_listed(tmp_path):
    found = jobs("sys.stdin.readline()", tmp_path, cases=("cnn", "mlp"), seconds=1.0)
    assert found.not_run == ["measure of cnn", "measure of mlp"] and not found.found


def test_a_child_whose_parent_is_gone_does_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    with warnings.catch_warnings():
        assert child.main(["measure", "mlp", str(tmp_path)], find=TINY.get, opened=rehearsed) == 1
    assert not list(tmp_path.iterdir())


# The command, its files and its page


def test_without_a_gpu_the_command_says_so(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main([]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.slow
def test_the_command_needs_no_optional_package():
    code = """
import sys
for name in ("optuna", "pandas", "matplotlib", "rich", "lightning", "accelerate", "timm"):
    sys.modules[name] = None
import reports.hardware.__main__, reports.hardware.child
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_page_shows_what_the_files_hold():
    page = (command.FOLDER / "README.md").read_text()
    assert section(load(command.FOLDER)) in page


@pytest.mark.gpu
@needs_gpu
def test_the_real_command_measures_a_workload(tmp_path):
    arguments = ["--only", "mlp-fp32", "--seconds", "150", "--folder", str(tmp_path)]
    code = command.main(arguments)
    [path] = tmp_path.glob("*.json")
    document = json.loads(path.read_text())
    [row] = document["workloads"]
    assert code == 0, row
    assert row["measure"]["ceiling"]["confirmed"] and not row["measure"]["proof"]["fits"]
    assert find_case("mlp-fp32").limit_bytes == row["measure"]["limit_bytes"]
