"""The chart of compared cards says the same as the table beside it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from matplotlib.axes import Axes
from torch import nn

import autobatch
from autobatch.gpus.catalogue import find_gpu
from autobatch.records.comparison import FrontierPoint, FrontierRecord, Outcome
from autobatch.report.charts.choices import (
    comparison_chart,
    draw_comparison,
    draw_frontier,
    frontier_chart,
)
from autobatch.report.comparison import comparison_document, frontier_document
from autobatch.report.document import Table
from autobatch.support.units import MIB


def test_plans_are_named_micro_batch_by_steps_and_ragged_ones_with_both_sizes() -> None:
    model = nn.Sequential(nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 8))
    t4 = find_gpu("t4")
    # no room for all samples at once
    small = replace(t4, name="small", capacity_bytes=t4.context_bytes + 470 * MIB)
    sample = torch.zeros(2, 4096), torch.zeros(2, dtype=torch.int64)
    compared = autobatch.compare(
        model, target=4099, gpus=[t4, small], sample=sample, loss=nn.CrossEntropyLoss()
    )
    chart = comparison_chart(compared)
    table = next(
        block
        for section in comparison_document(compared, charts=True).sections
        for block in section.blocks
        if isinstance(block, Table)
    )
    at = [table.columns.index(name) for name in ("card", "micro-batch", "steps")]
    cells = {row[at[0]]: f"{row[at[1]]} × {row[at[2]]}" for row in table.rows}
    assert {name: note for name, *_, note in chart.bars} == cells
    assert cells["t4"] == "4,099 × 1"
    plan = compared.plan("small")
    assert not plan.split.uniform
    sizes = sorted({size for window in plan.split.windows for size in window}, reverse=True)
    assert cells["small"] == f"{sizes[0]:,} or {sizes[1]:,} × {plan.accumulation_steps}"
    (axes,) = draw_comparison(chart).axes
    assert cells["small"] in {text.get_text() for text in axes.texts}
    assert "micro-batch × steps" in axes.get_xlabel()


def test_a_frontier_names_both_sizes_of_a_ragged_window() -> None:
    def build(width: int) -> autobatch.Workload:
        return autobatch.Workload(
            model=nn.Linear(width, 8), batch=lambda n: torch.zeros(n, width), sample_limit=4
        )

    found = autobatch.vary(build, target=7, gpu="t4", values=[16], name="width")
    document = frontier_document(found)
    assert "4 or 3 at 16" in document.title
    table = next(b for s in document.sections for b in s.blocks if isinstance(b, Table))
    assert table.rows[0][table.columns.index("micro-batch")] == "4 or 3"


def frontier(*points: tuple[int, int, int | None]) -> FrontierRecord:
    """Return a frontier of (value, planned micro-batch, ceiling; None for that of the search)."""
    return FrontierRecord(
        parameter="width",
        model="Linear",
        gpu=find_gpu("t4"),
        target=64,
        world_size=1,
        headroom=0.1,
        mixed_reserved_bytes=None,
        warnings=(),
        notes=(),
        versions={},
        created="2026-01-01T00:00:00Z",
        seconds=1.0,
        points=tuple(
            FrontierPoint(
                value=value,
                outcome=Outcome(
                    micro_batch=size,
                    accumulation_steps=1,
                    ceiling=ceiling,
                    ceiling_at_least=ceiling or 65_536,
                    budget_bytes=MIB,
                    peak_reserved_bytes=MIB,
                    evidence="predicted",
                ),
            )
            for value, size, ceiling in points
        ),
    )


def drawn(found: FrontierRecord) -> tuple[Axes, list[str]]:
    figure = draw_frontier(frontier_chart(found))
    (legend,) = figure.legends
    return figure.axes[0], [text.get_text() for text in legend.get_texts()]


def test_ceilings_that_are_the_searchs_limit_have_an_arrow_that_the_legend_names() -> None:
    axes, legend = drawn(frontier((64, 64, None), (256, 64, 4000), (1024, 64, None)))
    arrows = [text.xy for text in axes.texts if text.arrow_patch is not None]
    assert arrows == [(64, 65_536), (1024, 65_536)]
    assert "at least: the search went no further" in legend
    axes, legend = drawn(frontier((64, 64, 5000)))
    assert not axes.texts and legend == ["ceiling: the largest that fits", "plan"]


@pytest.mark.parametrize(("ceiling", "scale"), [(65_536, "log"), (128, "linear")])
def test_a_plan_far_below_its_ceiling_is_not_drawn_at_zero(ceiling: int, scale: str) -> None:
    axes, _ = drawn(frontier((64, 64, ceiling), (128, 64, ceiling)))
    assert axes.get_yscale() == scale
    bottom, top = axes.transData.inverted().transform(axes.bbox.corners())[[0, 1], 1]
    assert bottom < 64 < ceiling < top


def test_costs_of_the_chart_are_those_of_the_table() -> None:
    compared = autobatch.compare(
        nn.Linear(16, 8),
        target=64,
        gpus=["t4", "l4"],
        prices={"t4": 0.35, "l4": 0.8},
        sample=torch.zeros(2, 16),
        loss=lambda model, batch: model(batch).sum(),
    )
    rows = next(
        block.rows
        for section in comparison_document(compared, charts=True).sections
        for block in section.blocks
        if isinstance(block, Table)
    )
    costs = {row[0]: row[-1] for row in rows}
    assert all(0 < float(cost) < 0.01 for cost in costs.values())
    for name, *_, note in comparison_chart(compared).bars:
        assert note.endswith(f", {costs[name]} a million samples")
