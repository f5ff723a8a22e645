"""`python -m reports.zoo`: what is tried, how plans are checked, and what is rendered."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autobatch.devices.virtual.gpu import VirtualGpu
from autobatch.gpus.catalogue import find_gpu
from autobatch.workload.sample import batch_builder
from autobatch.workload.workload import Workload
from reports.common.journal import append
from reports.zoo import __main__ as command
from reports.zoo import checks, render
from reports.zoo.entries import Entry, Step, entries, selected, step
from reports.zoo.on_cpu import OnCpu, on_cpu, optimizer_bytes, storage_bytes
from reports.zoo.results import summarise, without_folders
from reports.zoo.text import result
from reports.zoo.trial import attempt

WIDTH = 16
ROW = 4 * WIDTH


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Sigmoid(), nn.Linear(WIDTH, WIDTH))


def mean(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).mean()


def workload(**options: Any) -> Workload:
    batch = batch_builder(torch.rand(2, WIDTH))
    return Workload(**{"model": net(), "batch": batch, "loss": mean} | options)


# What is tried


def test_there_are_sixty_workloads_of_twenty_five_packages_and_each_says_what_it_is():
    known = entries()
    packages = {name for entry in known.values() for name in entry.packages}
    assert len(known) >= 60 and len(packages) >= 25
    assert all(entry.what for entry in known.values())


def test_the_packages_of_workloads_are_the_requirements_of_the_report():
    file = Path(command.__file__).parent / "requirements.txt"
    listed = {line for line in file.read_text().splitlines() if line and line[0] != "#"}
    assert {name for entry in entries().values() for name in entry.packages} <= listed


def test_workloads_are_selected_by_name_area_or_package():
    known = entries()
    assert [entry.name for entry in selected(known, "nanogpt")] == ["nanogpt"]
    assert all("peft" in entry.packages for entry in selected(known, "peft"))
    assert {entry.area for entry in selected(known, "speech")} == {"speech"}
    assert selected(known, None) == list(known.values())


def test_a_workload_whose_package_is_missing_is_skipped_with_the_reason():
    def make() -> Step:
        """Needs what nobody has."""
        raise AssertionError("not to be called")

    record = attempt(Entry("some", "area", ("torch", "no-such-package"), make))
    assert record["outcome"] == "skipped" and record["reason"] == "not installed: no-such-package"


def test_what_a_workload_raises_is_in_its_record():
    def make() -> Step:
        """Fails in its forward pass."""
        return step(net(), target=4, sample=torch.rand(2, WIDTH + 1), loss=mean)

    record = attempt(Entry("some", "area", (), make))
    assert record["outcome"] == "failed" and "WorkloadError" in record["reason"]


# What is compared


def test_the_cpu_counts_what_the_forward_pass_leaves():
    found = on_cpu(workload(), 8, step=True)
    # the first layer's output is written over by no one, the sigmoid's is saved; the batch is given
    assert found.saved_bytes == 8 * ROW
    assert found.alive_bytes == 8 * ROW + 4  # and the loss


def test_what_only_the_loop_holds_is_alive_and_not_saved():
    class Held:
        def __init__(self) -> None:
            self.last: Any = None

        def __call__(self, model: nn.Module, batch: Tensor) -> Tensor:
            self.last = model(batch)
            return self.last.mean()

    found = on_cpu(workload(loss=Held()), 8, step=False)
    assert found.alive_bytes - found.saved_bytes == 8 * ROW + 4
    assert found.state_bytes is None


def test_the_state_of_optimizers_is_counted_wherever_they_keep_it():
    model = net()
    optimizer = torch.optim.SGD(model.parameters())
    weights = storage_bytes(model.parameters())
    assert optimizer_bytes([optimizer], model) == 0
    optimizer.kept = [{"moments": [p.detach().clone() for p in model.parameters()]}]  # type: ignore[attr-defined]
    assert optimizer_bytes([optimizer], model) == weights


def test_a_simulation_agrees_with_the_cpu_and_half_of_it_does_not():
    made, device = workload(), VirtualGpu(find_gpu("t4"))
    ran = [on_cpu(made, 512, step=True), on_cpu(made, 1024, step=False)]
    left = checks.simulated(made, device, (512, 1024, 4096))
    assert all(check.passes for check in checks.activations(left, ran, 4096))
    half = {size: found // 2 for size, found in left.items()}
    assert not any(check.passes for check in checks.activations(half, ran, 4096))


def test_bytes_are_continued_by_as_many_terms_as_sizes_ran():
    ran = [
        OnCpu(micro_batch=n, alive_bytes=3 * n * n + 5 * n + 7, saved_bytes=0, state_bytes=None)
        for n in (2, 3, 5)
    ]
    assert checks.continued(ran, 100) == 3 * 100**2 + 5 * 100 + 7


def test_a_model_that_was_changed_is_not_untouched():
    model = net()
    seen = checks.Untouched(model)
    assert seen.check().passes
    model.eval()
    with torch.no_grad():
        model[0].weight[0, 0] += 1
    check = seen.check()
    assert not check.passes and "0.weight" in check.note


def test_a_plan_that_agrees_is_right_and_one_for_other_weights_is_wrong():
    def make(extra: int = 0) -> Step:
        """Trains a small net."""
        learned = [torch.rand(extra)] if extra else []
        model, sample = net(), torch.rand(2, WIDTH)
        return step(model, target=512, sample=sample, loss=mean, learned=learned, gpu="t4")

    right = attempt(Entry("some", "area", (), make))
    assert right["verdict"] == "right", right
    assert {check["check"] for check in right["checks"]} >= {"untouched", "optimizer", "slope"}
    wrong = attempt(Entry("some", "area", (), lambda: make(5)))
    assert wrong["verdict"] == "wrong" and wrong["reason"].startswith("parameters")


# The command

WORKER = """
import json, sys, os
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    name = json.loads(line)["name"]
    if name == "lora":
        os._exit(3)
    record = {"key": name, "area": "language", "what": "A step", "packages": {}}
    print(json.dumps(record | {"outcome": "failed", "reason": "Odd: x"}), flush=True)
    print(json.dumps({"done": True}), flush=True)
"""


@pytest.fixture
def worker(tmp_path, monkeypatch):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    monkeypatch.setattr(command, "WORKER", (sys.executable, "-S", str(script)))


def test_every_workload_has_a_record_also_one_whose_process_died(worker, tmp_path, capsys):
    out = tmp_path / "out"
    assert command.main(["--match", "lora", "--out", str(out)]) == 0
    assert command.main(["--match", "nanogpt", "--out", str(out)]) == 0
    facts = json.loads((out / "results.json").read_text())
    assert {row["key"] for row in facts["rows"]} == {"lora", "nanogpt"}
    assert facts["workloads"] == 2 and facts["right"] == 0
    assert "exit code 3" in capsys.readouterr().out


def test_what_is_in_the_journal_is_not_tried_again(worker, tmp_path):
    journal = tmp_path / "rows.jsonl"
    append(journal, {"key": "nanogpt", "outcome": "planned", "verdict": "right"})
    chosen = selected(entries(), "nanogpt")
    assert "reason" not in command.try_workloads(chosen, journal, workers=1)["nanogpt"]
    again = command.try_workloads(chosen, journal, workers=1, fresh=True)
    assert again["nanogpt"]["reason"] == "Odd: x"


def test_nothing_that_matches_is_a_usage_error(tmp_path, capsys):
    assert command.main(["--match", "no such", "--out", str(tmp_path)]) == 2
    assert "nothing is called" in capsys.readouterr().err


# What is kept


def row(name: str, **more: Any) -> dict[str, Any]:
    facts = {
        "key": name,
        "area": "language",
        "what": "A step",
        "packages": {"peft": "1.0"},
        "outcome": "planned",
        "verdict": "right",
        "gpu": "t4",
        "micro_batch": 8,
        "accumulation_steps": 4,
        "ceiling": 9,
        "allocated_bytes": 2**30,
        "executions": 3,
        "method": "trace model",
        "seconds": 1.5,
        "warnings": ["careful"],
        "checks": [{"check": "activations", "expected": 1000, "found": 1001, "passes": True}],
    }
    return facts | more


def test_the_table_says_what_is_right_what_is_not_and_why():
    rows = [
        row("good"),
        row("bad", verdict="wrong", reason="slope: 1 for 2", checks=[]),
        {
            "key": "gone",
            "area": "language",
            "packages": {"x": None},
            "outcome": "skipped",
            "reason": "not installed: x",
        },
    ]
    facts = {"date": "2026-11-27", "versions": {"torch": "2"}, "gpu": "a100-40gb", "rows": rows}
    text = result(facts | summarise(rows))
    assert "**1 of 2 workloads (50 %) get a right plan**, from 1 packages" in text
    assert (
        "| `good`: A step | peft 1.0 | 8×4 on t4 | 9 | 1.0 GiB | 3 | 1.5 | +0.10 % | right |"
        in text
    )
    assert "slope: 1 for 2" in text and "not installed: x" in text
    assert "| careful | `good`, `bad` |" in text


def test_a_finished_run_is_taken_into_the_readme(tmp_path):
    (tmp_path / "README.md").write_text("a\n<!-- result -->old<!-- /result -->\nb\n")
    rows = [row("good")]
    facts = {"date": "2026-11-27", "versions": {}, "gpu": "t4", "rows": rows, **summarise(rows)}
    run = tmp_path / "run"
    run.mkdir()
    (run / "results.json").write_text(json.dumps(facts))
    assert render.main([str(run), "--folder", str(tmp_path)]) == 0
    text = (tmp_path / "README.md").read_text()
    assert "`good`" in text and "old" not in text
    assert re.match(r"a\n<!-- result -->", text) and text.endswith("<!-- /result -->\nb\n")


def test_an_upper_bound_may_be_above_but_not_below():
    found = [checks.bound("upper bound", 100, size).passes for size in (90, 100, 120, 130)]
    assert found == [False, True, True, False]


def test_results_hold_no_folder_of_the_machine():
    texts = {"warnings": ["read at /home/me/lib/roi.py:10 as True", "(/tmp/a/b.py:3)", "8/2 a/b"]}
    assert without_folders(texts) == {
        "warnings": ["read at roi.py:10 as True", "(b.py:3)", "8/2 a/b"]
    }
