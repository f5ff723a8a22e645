"""The command `advise`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from autobatch.cli.advise import _size_of
from autobatch.cli.entry_point import main
from autobatch.cli.running import subject
from autobatch.plan.advice import Advice

MODEL = """
from torch import nn

def model():
    return nn.Sequential(nn.Linear(512, 2048), nn.ReLU(), nn.Linear(2048, 512))
"""


@pytest.fixture
def spec(tmp_path: Path) -> str:
    file = tmp_path / "model.py"
    file.write_text(MODEL)
    return f"{file}:model"


def asked(spec: str, *options: str) -> list[str]:
    given = ["--target", "64", "--gpu", "t4", "--levers", "precision", "--no-isolate"]
    return ["advise", spec, *given, *options]


def test_advise_prints_a_table_and_lines_of_code(
    spec: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(asked(spec)) == 0
    out, err = capsys.readouterr()
    assert out.startswith("fits as it is: micro-batch 64 x 1")
    assert "precision: " in out and "torch.autocast" in out
    assert "trying" in err


def test_advise_writes_json(spec: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "advice.json"
    assert main(asked(spec, "--json", str(file))) == 0
    capsys.readouterr()
    assert main(asked(spec, "--json", "-")) == 0
    printed = capsys.readouterr().out
    saved, told = Advice.from_json(file.read_text()), Advice.from_json(printed)
    assert saved.choices == told.choices
    assert json.loads(printed)["evidence"] == "simulated"
    assert json.loads(printed)["schema_version"] == 1


def test_advise_refuses_an_unknown_lever_in_one_line(
    spec: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["advise", spec, "--target", "64", "--gpu", "t4", "--levers", "precisoin"]
    assert main([*arguments, "--no-isolate"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("autobatch: error: there is no lever 'precisoin'")
    assert "precision" in error


def test_the_length_of_sequences_is_read_from_a_batch() -> None:
    pytest.importorskip("transformers")
    workload = subject("hf:gpt2?seq=96&n_layer=2")
    assert _size_of(workload, "seq") == 96
