"""The chart of compared cards says the same as the table beside it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

import autobatch
from autobatch.gpus.catalogue import find_gpu
from autobatch.report.charts.choices import comparison_chart, draw_comparison
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
