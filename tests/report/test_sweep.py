"""What the report of a sweep says of its front."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from autobatch.report.sweep import sweep_document, sweep_summary

pytest.importorskip("optuna")

from tests.support.sweeps import FakeBench, fake_sweep

STAR = "* training computes something else than as it is."


@pytest.fixture
def swept(monkeypatch: pytest.MonkeyPatch) -> Any:
    return fake_sweep(FakeBench(), monkeypatch)


def starred(found: Any) -> Any:
    """Return a sweep whose front changes numbers."""
    front = {trial.number for trial in found.front}
    changed = (replace(each, changes_numerics=each.number in front) for each in found.trials)
    return replace(found, trials=tuple(changed))


def test_a_star_is_explained_wherever_it_stands(swept: Any, tmp_path: Path) -> None:
    found = starred(swept)
    page = found.report(tmp_path / "report")
    assert STAR in page.read_text()
    assert f"\\{STAR}" in page.with_name("report.md").read_text()
    assert STAR in str(found)


def test_where_there_is_no_star_nothing_is_explained(swept: Any) -> None:
    assert STAR not in str(sweep_summary(swept)) + str(sweep_document(swept))
