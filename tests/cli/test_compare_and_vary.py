from __future__ import annotations

import json
from pathlib import Path

import pytest

from autobatch.choosing.comparison import Comparison
from autobatch.choosing.frontier import Frontier
from autobatch.cli import main

CODE = """
import torch
from torch import nn
from autobatch import Workload

def model():
    print("the user's own words")
    return Workload(
        model=nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1)),
        batch=lambda n: torch.zeros(n, 3, 64, 64),
    )

def sized(size=64, *, depth=1):
    layers = [nn.Conv2d(3 if i == 0 else 32, 32, 3) for i in range(depth)]
    return Workload(
        model=nn.Sequential(*layers, nn.ReLU(), nn.AdaptiveAvgPool2d(1)),
        batch=lambda n: torch.zeros(n, 3, size, size),
    )

def needs(seq, width):
    return nn.Linear(seq, width)

made = nn.Linear(8, 8)
"""

GPT2 = "hf:gpt2?n_layer=1&n_embd=64&n_head=2&vocab_size=1000"


@pytest.fixture
def spec(tmp_path: Path) -> str:
    (tmp_path / "code.py").write_text(CODE)
    return f"{tmp_path / 'code.py'}:model"


CARDS = ["--target", "64", "--gpus", "t4, a100-40gb"]


@pytest.mark.slow
def test_compare_answers_on_stdout_and_reports_progress_on_stderr(
    spec: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", spec, *CARDS, "--price", "t4=0.35"]) == 0
    out, err = capfd.readouterr()
    assert out.startswith("2 of 2 cards can train an effective batch of 64\n")
    assert "t4" in out and "est. cost/1M" in out and "estimate" in out
    assert "a100-40gb: simulating two training windows" in err
    assert "the user's own words" in err and "the user's own words" not in out


def test_the_comparison_is_written_as_json_and_as_a_report(
    spec: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, folder = tmp_path / "c.json", tmp_path / "r"
    options = ["--no-isolate", "--json", str(file), "--report", str(folder)]
    assert main(["compare", spec, *CARDS, *options]) == 0
    assert Comparison.load(file) == Comparison.load(folder / "comparison.json")
    assert f"report: {folder / 'report.html'}" in capsys.readouterr().out
    assert main(["compare", spec, *CARDS, "--no-isolate", "--json", "-"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [card["gpu"]["name"] for card in document["cards"]] == ["t4", "a100-40gb"]
    assert all(card["outcome"]["window"]["evidence"] == "estimate" for card in document["cards"])


def test_options_of_the_workload_reach_the_comparison(
    spec: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--world-size", "2", "--optimizer", "sgd", "--headroom", "0.3", "--no-isolate"]
    assert main(["compare", spec, *CARDS, *options, "--json", "-"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["world_size"], document["sharding"]) == (2, "ddp")
    assert document["headroom"] == 0.3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpus", "t4,t5"], "'t5' is not in the catalogue"),
        (["--gpus", "t4,T4"], "--gpus names t4 twice"),
        (["--gpus", "t4,t5"], "such as --gpus 24GiB"),
        (["--gpus", ""], "--gpus names no card"),
        (["--gpus", ","], "--gpus has an empty name: use --gpus t4,l4"),
        (["--gpus", "cuda:0"], "--gpus names 'cuda:0'"),
        (["--gpus", "t4", "--price", "l4=1"], "a price for l4, which is not compared"),
        (["--gpus", "t4", "--price", "t4=abc"], "--price is 't4=abc': write GPU=NUMBER"),
        (["--gpus", "t4", "--price", "t4"], "--price is 't4': write GPU=NUMBER"),
        (["--gpus", "t4", "--price", "=3"], "--price is '=3': write GPU=NUMBER"),
        (["--gpus", "t4", "--price", "t4=-2"], "the price of t4 is -2.0"),
        (["--gpus", "t4", "--price", "t4=inf"], "the price of t4 is inf"),
        (["--gpus", "t4", "--price", "t4=1", "--price", "t4=2"], "two prices for t4"),
        (["--gpus", "t4", "--json", "/no/such/folder/x.json"], "cannot write the file"),
    ],
)
def test_what_compare_cannot_understand_is_one_line_and_code_2(
    options: list[str], message: str, spec: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", spec, "--target", "64", *options]) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1  # nothing was begun
    assert err.startswith("autobatch: error: ") and message in err


def test_where_no_card_fits_the_table_says_so_and_the_code_is_3(
    spec: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--target", "64", "--gpus", "505MiB", "--headroom", "0.9", "--no-isolate"]
    assert main(["compare", spec, *options]) == 3
    out = capsys.readouterr().out
    assert out.startswith("0 of 1 card can train")
    assert "short" in out and "the smallest card of the catalogue that would do: rtx-3060" in out


@pytest.mark.slow
@pytest.mark.parametrize("command", ["vary", "probe"])
def test_vary_shows_the_frontier(command: str, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    options = ["--target", "32", "--gpu", "t4", "--vary", "seq=64,32"]
    assert main([command, GPT2, *options]) == 0
    out, err = capfd.readouterr()
    assert out.startswith("micro-batch along seq: 32 at 32, 32 at 64\n")
    rows = [line.split() for line in out.splitlines()]
    assert [row[0] for row in rows if row and row[0] in ("32", "64")] == ["32", "64"]
    assert "est. tokens/s" in out and "bucket" in out
    assert "seq=64: simulating two training windows" in err


@pytest.mark.slow
@pytest.mark.parametrize("name", ["size", "depth"])
def test_an_argument_of_the_users_function_varies(
    name: str, spec: str, capfd: pytest.CaptureFixture[str]
) -> None:
    options = ["--target", "32", "--gpu", "t4", "--vary", f"{name}=3,5", "--json", "-"]
    assert main(["vary", spec.replace(":model", ":sized"), *options]) == 0
    document = json.loads(capfd.readouterr().out)
    assert (document["parameter"], [p["value"] for p in document["points"]]) == (name, [3, 5])
    small, large = (point["outcome"]["peak_reserved_bytes"] for point in document["points"])
    assert small <= large
    assert [p["bucket"] is None for p in document["points"]] == [name == "depth"] * 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("model", "cannot be called with seq=8 alone (got an unexpected keyword argument 'seq')"),
        ("needs", "cannot be called with seq=8 alone (missing a required argument: 'width')"),
        ("made", "is a Linear: name a function that takes seq=8"),
        ("missing", "has no function 'missing'"),
    ],
)
def test_a_function_that_does_not_take_the_parameter_is_refused_in_one_line(
    function: str, message: str, spec: str, capfd: pytest.CaptureFixture[str]
) -> None:
    options = ["--target", "8", "--gpu", "t4", "--vary", "seq=8"]
    assert main(["vary", spec.replace(":model", f":{function}"), *options]) == 2
    out, err = capfd.readouterr()
    assert out == "" and message in err and err.count("\n") == 1


def test_the_frontier_is_written_as_json_and_as_a_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    file, folder = tmp_path / "f.json", tmp_path / "r"
    options = ["--target", "32", "--gpu", "t4", "--vary", "n_layer=1,2", "--no-isolate"]
    assert main(["vary", GPT2, *options, "--json", str(file), "--report", str(folder)]) == 0
    assert Frontier.load(file) == Frontier.load(folder / "frontier.json")
    assert f"report: {folder / 'report.html'}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("spec", "given", "message"),
    [
        (GPT2, "seq", "--vary is 'seq': write NAME=N,N"),
        (GPT2, "=5", "--vary is '=5': write NAME=N,N"),
        (GPT2, "seq=", "there are no values to vary"),
        (GPT2, "seq=a,b", "a value is 'a': use whole numbers"),
        (GPT2, "seq=1.5", "a value is '1.5': use whole numbers"),
        (GPT2, "seq=-4", "a value is '-4': use whole numbers"),
        (GPT2, "seq=0", "a value is 0: use whole numbers"),
        (GPT2, "seq=8,8", "the value 8 is given twice"),
    ],
)
def test_what_vary_cannot_understand_is_one_line_and_code_2(
    spec: str, given: str, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["vary", spec, "--target", "8", "--gpu", "t4", "--vary", given]) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith("autobatch: error: ") and message in err


def test_a_parameter_that_the_model_does_not_have_is_refused_by_name(
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("transformers")
    options = ["--target", "8", "--gpu", "t4", "--vary", "n_layers=1,2", "--no-isolate"]
    assert main(["vary", GPT2, *options]) == 2
    assert "has no 'n_layers' (did you mean" in capsys.readouterr().err


def test_probe_refuses_to_prove_a_frontier(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--target", "8", "--gpu", "t4", "--vary", "seq=8", "--prove"]
    assert main(["probe", GPT2, *options]) == 2
    assert "leave it out with --vary" in capsys.readouterr().err
