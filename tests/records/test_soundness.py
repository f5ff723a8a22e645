"""Plans whose figures no tuner writes are refused when they are read, in one line."""

import json
from dataclasses import replace

import pytest

from autobatch.cli import main
from autobatch.errors import FileError
from autobatch.plan.plan import Plan
from autobatch.records.codec import RecordError
from autobatch.records.evidence import SpeedPoint
from autobatch.records.soundness import check_sound
from tests.support.plans import example_plan

SPEED = SpeedPoint(
    micro_batch=8, accumulation_steps=2, window_seconds=2.0, low=1.0, high=3.0, how="estimate"
)


def plan_with_all():
    """A plan that has what may be left out of one."""
    plan = example_plan(speed=(SPEED,))
    trials = tuple(
        replace(trial, window_seconds=1.5, window_range=(1.0, 2.0)) for trial in plan.trials
    )
    footprint = replace(plan.footprint, low_device_bytes=2, high_device_bytes=3)
    return replace(plan, trials=trials, footprint=footprint)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("trials.0.window_seconds", 0),
        ("trials.0.window_seconds", -1),
        ("trials.0.window_range", [2.0, 1.0]),
        ("trials.0.window_range", [0, 1.0]),
        ("speed.0.window_seconds", 0),
        ("speed.0.low", 0),
        ("speed.0.low", 4),
        ("footprint.high_device_bytes", None),
        ("footprint.low_device_bytes", None),
        ("footprint.low_device_bytes", 4),
        ("footprint.peak_reserved_bytes", 0),
        ("ceiling_footprint.peak_reserved_bytes", 1),
        ("timeline.marks", []),
        ("timeline.samples", []),
        ("model.optimizer", "\ud800"),
        ("warnings.0", "half of \udfff"),
        ("versions.\ud800", "1"),
    ],
)
def test_a_figure_that_no_tuner_writes_is_refused_in_one_line(path, value, tmp_path, capsys):
    document = json.loads(replace(plan_with_all(), warnings=("one",)).to_json())
    place = document
    *parents, last = (int(part) if part.isdigit() else part for part in path.split("."))
    for parent in parents:
        place = place[parent]
    place[last] = value
    text = json.dumps(document)
    with pytest.raises(FileError) as caught:
        Plan.from_json(text)
    assert "\n" not in str(caught.value)
    file = tmp_path / "plan.json"
    file.write_text(text)
    assert main(["report", str(file), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_phases_and_samples_out_of_order_are_refused():
    plan = plan_with_all()
    check_sound(plan)
    for name in ("marks", "samples"):
        turned = replace(plan.timeline, **{name: getattr(plan.timeline, name)[::-1]})
        assert len(getattr(turned, name)) > 1
        with pytest.raises(RecordError, match="in order"):
            check_sound(replace(plan, timeline=turned))
