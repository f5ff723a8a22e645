from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from tests.support import ROOT

EXAMPLES = ROOT / "examples"

pytestmark = pytest.mark.slow


def run(*arguments: str) -> str:
    """Run Python from the repository's root, as a user would, and return what it printed."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    finished = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def numbers(pattern: str, text: str) -> list[int]:
    found = re.search(pattern, text)
    assert found, text
    return [int(number.replace(",", "")) for number in found.groups()]


def test_every_example_is_short_and_listed_in_the_readme() -> None:
    listed = (EXAMPLES / "README.md").read_text()
    for example in EXAMPLES.glob("*.py"):
        assert f"`{example.name}`" in listed
        assert len(example.read_text().splitlines()) <= 60


def test_the_language_model_gets_a_plan_that_makes_the_target_exactly() -> None:
    pytest.importorskip("transformers")
    printed = run("examples/gpt2_from_config.py")
    micro_batch, steps, effective = numbers(
        r"micro-batch ([\d,]+) × ([\d,]+) accumulation steps.* effective batch ([\d,]+)", printed
    )
    assert micro_batch * steps == effective == 512
    assert numbers(r"([\d,]+) parameters", printed) == [124_439_808]


def test_the_planned_loop_learns_the_digits() -> None:
    pytest.importorskip("sklearn")
    printed = run("examples/digits_cnn.py")
    micro_batch, steps, effective = numbers(r"(\d+) x (\d+) = (\d+) samples", printed)
    assert steps > 1
    assert micro_batch * steps == effective == 256
    (percent,) = numbers(r"held-out digits: (\d+)", printed)
    assert percent >= 95


def test_the_large_model_is_sharded_over_8_gpus() -> None:
    pytest.importorskip("transformers")
    # fewer layers than it has, to be quick
    small = "import autobatch, llama_on_8_gpus as x; print(autobatch.tune(x.build(2), target=64,"
    printed = run("-c", f"import sys; sys.path.append('examples'); {small} gpu='a100-40gb'))")
    assert "8 GPUs = effective batch 64" in printed
    assert "FSDP2" in printed


def test_the_workload_with_two_inputs_runs_by_itself() -> None:
    printed = run("examples/two_inputs.py")
    assert "effective batch 64" in printed
    assert "loss: yours" in printed


def test_the_command_line_plans_the_same_workload() -> None:
    probe = ("probe", "examples/two_inputs.py:build", "--target", "64", "--gpu", "t4")
    assert "effective batch 64" in run("-m", "autobatch", *probe)


def test_the_tuned_trainer_learns_to_reverse_numbers() -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    printed = run("examples/hf_trainer.py")
    micro_batch, steps, effective = numbers(r"(\d+) x (\d+) = (\d+) samples", printed)
    assert steps > 1
    assert micro_batch * steps == effective == 256
    assert numbers(r"(\d+) updates", printed) == [90]  # 30 epochs of 768 samples
    (percent,) = numbers(r"held out: (\d+)", printed)
    assert percent >= 95


def test_the_tuned_lightning_module_learns_the_digits() -> None:
    pytest.importorskip("lightning")
    pytest.importorskip("sklearn")
    printed = run("examples/lightning_trainer.py")
    micro_batch, steps, effective = numbers(r"(\d+) x (\d+) = (\d+) samples", printed)
    assert steps > 1
    assert micro_batch * steps == effective == 256
    (percent,) = numbers(r"held-out digits: (\d+)", printed)
    assert percent >= 95
