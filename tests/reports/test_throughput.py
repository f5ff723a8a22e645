"""`python -m reports.throughput` scores estimates as it says, and the constants are its own."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from autobatch.gpus.roofline import EFFICIENCY
from autobatch.gpus.work import OpWork, WindowWork, Work
from reports.throughput.__main__ import main
from reports.throughput.fit import fitted
from reports.throughput.results import BEGIN, END, RESULTS
from reports.throughput.rows import SOURCES, read_rows
from reports.throughput.score import Scored, in_order, percentile, scored, spearman, summary
from tests.support import ROOT

REPORT = ROOT / "reports" / "throughput"


def of(table: str) -> list:
    return [row for row in read_rows() if row.table == table]


def test_every_row_names_its_source_and_half_of_each_table_is_held_out() -> None:
    rows = read_rows()
    assert {row.table for row in rows} == set(SOURCES)
    assert len({row.key for row in rows}) == len(rows)
    for table in SOURCES:
        held_out = sum(row.half == "held out" for row in of(table))
        assert held_out == len(of(table)) // 2


def test_figures_of_every_unit_are_samples_of_one_card() -> None:
    images, tokens = of("timm nhwc")[0], of("torchtitan")[0]
    assert images.samples_per_second == images.published
    assert tokens.samples_per_second == tokens.published / tokens.size
    (step, *_) = of("v100 resnet-50")
    assert step.samples_per_second == pytest.approx(128 / 0.41284)


def test_an_error_is_the_factor_by_which_an_estimate_is_off() -> None:
    row = of("timm nhwc")[0]
    for factor in (2.0, 0.5):
        one = Scored(row, row.samples_per_second * factor, "memory")
        assert one.ratio == pytest.approx(factor)
        assert one.error == pytest.approx(1.0)


def test_a_summary_has_the_errors_and_the_order_of_its_rows() -> None:
    rows = of("timm nhwc")[:10]
    estimates = [Scored(row, row.samples_per_second * 1.1, "memory") for row in rows]
    estimates[3] = replace(estimates[3], samples_per_second=3 * rows[3].samples_per_second)
    found = summary(estimates)
    assert found["median"] == pytest.approx(0.1)
    assert found["worst"] == pytest.approx(2.0)
    assert found["p90"] == pytest.approx(0.1)
    assert found["spearman"] < 1
    assert in_order(estimates)[0] < in_order(estimates)[1] == 45


def test_ranks_of_equal_values_are_their_mean() -> None:
    assert spearman([1, 2, 3], [3, 2, 1]) == -1
    assert spearman([1, 1, 2, 3], [1, 1, 2, 3]) == 1
    assert spearman([1, 2], [1, 2]) is None
    assert spearman([1, 1, 1], [1, 2, 3]) is None
    assert percentile(range(1, 11), 0.9) == 9


def test_a_fit_finds_the_efficiency_that_rows_were_made_with() -> None:
    product = OpWork(op="mm", kind="matmul", precision="bf16", flops=1e15, bytes=1.0)
    work = WindowWork(samples=1, forward=Work.of([product]), backward=Work(), update=Work())
    row = next(row for row in of("torchtitan") if row.model == "llama3-8b")
    work = replace(work, samples=row.micro_batch)
    compute = {**EFFICIENCY.compute, "matmul": {"": 0.5}}
    truth = scored(row, work, replace(EFFICIENCY, compute=compute))
    made = replace(row, published=truth.samples_per_second * row.size)
    found = fitted([(made, work)])
    assert found.efficiency.of_compute("matmul", "ampere") == pytest.approx(0.5, rel=0.06)


def test_the_constants_and_their_range_are_those_of_the_report() -> None:
    document = json.loads((REPORT / RESULTS).read_text())
    known = document["efficiency"]
    assert known["memory"] == dict(EFFICIENCY.memory)
    assert known["compute"] == {kind: dict(of) for kind, of in EFFICIENCY.compute.items()}
    for name in ("low", "high"):
        assert getattr(EFFICIENCY, name) == pytest.approx(document["range"][name], abs=0.01)
    assert document["held out"]["all"]["spearman"] >= 0.9
    assert len(document["rows"]) == len(read_rows())


def test_a_published_figure_is_estimated_today_as_in_the_report() -> None:
    pytest.importorskip("timm")
    document = json.loads((REPORT / RESULTS).read_text())
    row = next(row for row in of("timm nchw") if row.model == "resnet18")
    kept = next(
        each
        for each in document["rows"]
        if (each["table"], each["number"]) == (row.table, row.number)
    )
    from reports.throughput.count import _counted

    assert scored(row, _counted(row)).rate == pytest.approx(kept["estimated_per_second"], rel=0.02)


def test_the_command_goes_on_and_its_results_are_rendered(tmp_path, monkeypatch) -> None:
    pytest.importorskip("timm")
    out = tmp_path / "out"
    arguments = ["--match", "v100*", "--out", str(out)]
    assert main(arguments) == 1  # two rows that nothing was fitted to have no order
    works = sorted((out / "works").iterdir())
    times = [file.stat().st_mtime_ns for file in works]
    assert len(works) == 4
    main(arguments)
    assert [file.stat().st_mtime_ns for file in works] == times
    folder = tmp_path / "report"
    folder.mkdir()
    (folder / "README.md").write_text(f"# Throughput\n{BEGIN}{END}\nend\n")
    monkeypatch.setattr("reports.throughput.results.FOLDER", folder)
    assert main(["render", str(out)]) == 0
    text = (folder / "README.md").read_text()
    assert "| v100 resnet-50 | 2 |" in text
    assert text.endswith("end\n")
