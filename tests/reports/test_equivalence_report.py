"""`python -m reports.equivalence` compares what it says it compares."""

from __future__ import annotations

import json

import pytest

from reports.equivalence.__main__ import main
from reports.equivalence.losses import LOSSES
from reports.equivalence.reference import reference
from reports.equivalence.results import BEGIN, END, is_false, is_right, summarise

BY_NAME = {case.name.removeprefix("loss: "): case for case in LOSSES}


def record(*, equivalent: bool | None, known: bool) -> dict[str, object]:
    return {"outcome": "checked", "equivalent": equivalent, "is_equivalent": known}


def test_a_verdict_is_right_false_an_alarm_or_undecided() -> None:
    records = [
        record(equivalent=True, known=True),
        record(equivalent=False, known=False),
        record(equivalent=True, known=False),
        record(equivalent=False, known=True),
        record(equivalent=None, known=True),
        {"outcome": "failed"},
    ]
    assert list(map(is_right, records)) == [True, True, False, False, False, False]
    assert [bool(is_false(each)) for each in records] == [False, False, True, False, False, False]
    assert summarise(records) == {
        "cases": 6,
        "right": 2,
        "false_equivalent": 1,
        "false_alarms": 1,
        "undecided": 1,
        "failed": 1,
    }


@pytest.mark.parametrize("name", ["mean square", "masked mean", "boxes", "flat boxes", "a sum"])
def test_plain_pytorch_agrees_with_what_is_known(name: str) -> None:
    case = BY_NAME[name]
    found = reference(case)
    assert found is not None
    assert (found < 1e-12) is case.is_equivalent


@pytest.mark.parametrize("name", ["Gumbel softmax", "an optimizer in hooks"])
def test_plain_pytorch_says_nothing_where_it_cannot(name: str) -> None:
    assert reference(BY_NAME[name]) is None


@pytest.mark.slow
def test_the_command_goes_on_and_its_results_are_rendered(tmp_path, monkeypatch) -> None:
    out = tmp_path / "out"
    assert main(["--match", "loss: a sum", "--out", str(out)]) == 0
    journal = (out / "cases.jsonl").read_text()
    assert main(["--match", "loss: a sum", "--out", str(out)]) == 0
    assert (out / "cases.jsonl").read_text() == journal
    assert json.loads((out / "results.json").read_text())["summary"]["right"] == 1
    monkeypatch.setattr("reports.equivalence.results.FOLDER", tmp_path)
    (tmp_path / "README.md").write_text(f"# Title\n{BEGIN}\n{END}\n")
    assert main(["render", str(out)]) == 0
    assert (
        "| loss: a sum | no: not divided at all | not equivalent | weight |"
        in (tmp_path / "README.md").read_text()
    )
