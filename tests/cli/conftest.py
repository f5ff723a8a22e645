from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import pytest

from autobatch.cli import running
from autobatch.plan.plan import Plan
from autobatch.records.progress import Progress
from tests.support.plans import example_plan, footprint_at


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Replace the tuner by one that answers at once and remembers what it was asked."""
    asked: list[dict[str, Any]] = []

    def tune(model: Any, *, progress: Callable[[Progress], None], **options: Any) -> Plan:
        model()
        asked.append(options)
        progress(Progress(step="running", executions=0, expected=3, micro_batch=2))
        return example_plan()

    def predict(model: Any, *, progress: Callable[[Progress], None], **options: Any) -> Any:
        model()
        asked.append(options)
        return footprint_at(32)

    monkeypatch.setitem(
        sys.modules, "autobatch.tuning.tuner", types.SimpleNamespace(tune=tune, predict=predict)
    )
    monkeypatch.setattr(running, "subject", lambda spec: spec)
    return asked
