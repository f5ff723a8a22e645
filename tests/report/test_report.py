from __future__ import annotations

import csv
import dataclasses
import re
import subprocess
import sys
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path
from xml.etree import ElementTree

import matplotlib as mpl
import pytest
from rich.console import Console

from autobatch.cli import terminal
from autobatch.errors import FileError
from autobatch.plan.plan import Plan
from autobatch.records.evidence import Timeline
from autobatch.report import drawings, html, markdown, rows, table, text
from autobatch.report.charts.frame import new_figure, save_svg, style
from autobatch.report.content import full_report, summary
from autobatch.report.document import (
    Bullets,
    Chart,
    Code,
    ContentBlock,
    Document,
    Facts,
    Paragraph,
    Section,
    Table,
)
from autobatch.report.footprint_summary import footprint_summary
from autobatch.report.page import figures
from tests.support.plans import BUDGET, example_plan, ragged_plan

FILES = {
    "breakdown.csv",
    "charts/breakdown.svg",
    "charts/memory.svg",
    "charts/timeline.svg",
    "curve.csv",
    "plan.json",
    "report.html",
    "report.md",
    "timeline.csv",
    "trials.csv",
}


class Page(HTMLParser):
    """Collects what a browser would load or run, and checks that tags close in order."""

    VOID = frozenset({"meta", "br", "img", "input"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.loads: list[str] = []
        self.scripts = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.scripts += tag == "script"
        self.ids += [value for name, value in attrs if name == "id" and value]
        if tag != "a":
            self.loads += [values[k] or "" for k in ("src", "href", "xlink:href") if k in values]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report")
    assert example_plan().report(path / "new") == path / "new" / "report.html"
    return path / "new"


def hostile_plan() -> Plan:
    plan = example_plan(warnings=("| <img src=x onerror=alert(1)> `</code>` $x_$ \n# title",))
    name = "<b>$\\frac</b>|`"
    return dataclasses.replace(
        plan,
        model=dataclasses.replace(plan.model, name=name, optimizer=name),
        gpu=dataclasses.replace(plan.gpu, name=name),
    )


def test_a_report_folder_holds_every_file(folder: Path) -> None:
    found = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert found == FILES


def test_the_saved_plan_in_the_folder_is_the_plan(folder: Path) -> None:
    assert Plan.load(folder / "plan.json") == example_plan()


def test_the_page_is_well_formed_and_loads_nothing(folder: Path) -> None:
    page = Page()
    page.feed((folder / "report.html").read_text())
    assert page.open == []
    assert page.scripts == 2  # the data, which is JSON, and the page's own
    assert all(target.startswith("#") for target in page.loads)
    assert len(page.ids) == len(set(page.ids))
    assert (folder / "report.html").read_text().count("<svg") == 2


def test_drawing_leaves_the_users_matplotlib_alone(tmp_path: Path) -> None:
    def draw() -> bytes:
        with style():
            figure, axes = new_figure("A chart", 3, bottom=0.2)
            axes.plot([1, 2], [3, 4])
            save_svg(figure, tmp_path, "chart")
        return (tmp_path / "chart.svg").read_bytes()

    with mpl.rc_context({"font.size": 33.0, "axes.facecolor": "red"}):
        before = dict(mpl.rcParams)
        styled = draw()
        assert dict(mpl.rcParams) == before
    assert draw() == styled


def test_a_report_of_a_plan_needs_no_matplotlib() -> None:
    code = (
        "import sys, tempfile; from tests.support.plans import example_plan; "
        "example_plan().report(tempfile.mkdtemp()); "
        "assert 'matplotlib' not in sys.modules, 'matplotlib was imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_report_answers_the_questions_with_this_models_figures(folder: Path) -> None:
    report = (folder / "report.md").read_text()
    for words in (
        "micro-batch 64 × 4 accumulation steps × 1 GPU = effective batch 256",
        "With and without accumulation",
        "79.1 GiB (predicted",
        "no BatchNorm",
        "Malladi et al. 2022",
        "2 / (1 - beta2) updates",
        "https://arxiv.org/abs/2205.10287",
        "(loss / steps).backward()",
        "![Bytes by category at the peak, against the budget.](charts/breakdown.svg)",
    ):
        assert words in report


def test_sgd_gets_the_linear_rule() -> None:
    report = markdown.render(full_report(ragged_plan(8, ((4, 4),), optimizer="SGD")))
    assert "Goyal et al. 2017" in report
    assert "Malladi" not in report


def test_the_same_words_are_in_markdown_html_and_text() -> None:
    document = full_report(example_plan())
    pages = (
        markdown.render(document),
        html.page(document, dict.fromkeys(("memory", "breakdown", "timeline"), "<svg></svg>")),
        text.render(document),
    )
    prose = [b.text for s in document.sections for b in s.blocks if isinstance(b, Paragraph)]
    for words in prose:
        opening = " ".join(re.split(r"[`(<'&]", words)[0].split()[:5])
        assert all(opening in page for page in pages)


@pytest.mark.parametrize(
    ("block", "markup"),
    [
        (Paragraph("see `a<b` at https://x.org/y."), "<code>a&lt;b</code> at <a href"),
        (Bullets(("`a`", "b")), "<li><code>a</code></li>"),
        (Facts((("a", "b<"),)), "<dt>a</dt><dd>b&lt;</dd>"),
        (Table(("a",), "r", (("1",), ("2",)), frozenset({1})), '<tr class="total">'),
        (Code("x = 1 < 2\n"), '<pre tabindex="0"><code>x = 1 &lt; 2\n</code></pre>'),
        (
            Chart("memory", "a<"),
            'aria-label="a&lt;" tabindex="0"><svg></svg></div><figcaption>a&lt;',
        ),
    ],
)
def test_every_kind_of_block_has_its_markup(block: ContentBlock, markup: str) -> None:
    page = html.page(Document("", "", (Section("", (block,)),)), {"memory": "<svg></svg>"})
    assert markup in page


def test_hostile_names_stay_text_in_every_format(tmp_path: Path) -> None:
    plan = hostile_plan()
    page = plan.report(tmp_path).read_text()
    parsed = Page()
    parsed.feed(page)
    assert "<img" not in page
    assert "<b>$" not in page
    assert "<img" not in (tmp_path / "report.md").read_text().replace("\\<img", "")
    assert "\n# title" not in (tmp_path / "report.md").read_text()
    assert "<img" not in plan._repr_html_()
    console = Console(file=StringIO(), width=120)
    terminal.draw(summary(plan), console)


def test_every_row_of_a_markdown_table_has_the_same_number_of_cells() -> None:
    report = markdown.render(full_report(hostile_plan()))
    for block in report.split("\n\n"):
        rows = [line for line in block.splitlines() if line.startswith("| ")]
        cells = {len(re.findall(r"(?<!\\)\|", row)) for row in rows}
        assert len(cells) <= 1


def test_the_account_sums_to_what_the_device_holds() -> None:
    plan = example_plan()
    account = next(
        block
        for section in summary(plan).sections
        for block in section.blocks
        if isinstance(block, Table) and block.columns[0] == "category"
    )
    sizes = [int(row[1].replace(",", "")) for row in account.rows]
    parts = [size for index, size in enumerate(sizes) if index not in account.totals]
    assert sum(parts) == sizes[-1] == plan.footprint.peak_device_bytes


def test_a_breakdown_frame_sums_to_what_the_device_holds() -> None:
    plan = example_plan()
    sums = table.frame(plan, "breakdown").groupby("at")["size_bytes"].sum()
    assert sums["plan"] == plan.footprint.peak_device_bytes
    assert sums["ceiling"] == plan.ceiling_footprint.peak_device_bytes


def test_csv_files_hold_what_data_frames_do() -> None:
    plan = example_plan()
    for name, make in rows.ROWS.items():
        assert make(plan).to_csv() == table.frame(plan, name).to_csv(index=False)


def test_the_curve_frame_says_what_fits(folder: Path) -> None:
    rows = list(csv.DictReader(StringIO((folder / "curve.csv").read_text())))
    assert [int(row["micro_batch"]) for row in rows] == sorted(int(r["micro_batch"]) for r in rows)
    for row in rows:
        assert (row["fits"] == "True") == (int(row["peak_reserved_bytes"]) <= BUDGET)


def test_the_drawing_of_the_curve_has_a_mark_for_each_point_and_one_for_the_plan() -> None:
    plan = example_plan()
    drawn = drawings.memory(plan)
    simulated = sum(point.evidence == "simulated" for point in plan.curve)
    assert drawn.count("l5 5l-5 5") == simulated + 1  # one is in the legend
    assert drawn.count("<circle") == len(plan.curve) - simulated + 1 + 2
    assert ">plan 64<" in drawn
    assert ">ceiling 115<" in drawn


def test_bars_are_as_long_as_what_is_on_the_device() -> None:
    plan = example_plan()
    bar = figures.bar(plan)
    taken = plan.footprint.peak_device_bytes
    assert sum(part.width for part in bar.parts) == pytest.approx(100 * taken / bar.whole_bytes)
    assert bar.budget - 100 * plan.footprint.context_bytes / bar.whole_bytes == pytest.approx(
        100 * plan.budget_bytes / bar.whole_bytes
    )
    both = drawings.breakdown(plan)
    assert ">plan 64<" in both
    assert ">ceiling 115<" in both
    assert ">ceiling" not in drawings.breakdown(ragged_plan(115, ((115,),)))


def test_names_of_a_plan_are_text_in_its_drawings() -> None:
    timeline = example_plan().timeline
    marks = ((0, "<b>&", 0, 0), *timeline.marks[1:])
    plan = example_plan(timeline=dataclasses.replace(timeline, marks=marks))
    ElementTree.fromstring(drawings.timeline(plan))
    assert "<b>" not in drawings.timeline(plan)


def boxes_of_text(drawing: str) -> list[tuple[str, float, float, float, float]]:
    """Return texts with the edges of the boxes that they are in: left, right, top, bottom."""
    boxes = []
    for element in ElementTree.fromstring(drawing).iter("{http://www.w3.org/2000/svg}text"):
        size, text = float(element.attrib["font-size"]), element.text or ""
        width = 0.6 * size * len(text)
        left = (
            float(element.attrib["x"])
            - {"start": 0, "middle": 0.5, "end": 1}[element.attrib["text-anchor"]] * width
        )
        bottom = float(element.attrib["y"])
        boxes.append((text, left, left + width, bottom - 0.8 * size, bottom))
    return boxes


def of_many_samples() -> Plan:
    """A plan whose micro-batches have long numbers."""
    plan = example_plan()
    ceiling, chosen = 1_048_576, 1_000_000
    return dataclasses.replace(
        plan,
        ceiling=None,
        ceiling_at_least=ceiling,
        footprint=dataclasses.replace(plan.footprint, micro_batch=chosen),
        ceiling_footprint=dataclasses.replace(plan.ceiling_footprint, micro_batch=ceiling),
        curve=tuple(
            dataclasses.replace(point, micro_batch=point.micro_batch * ceiling // 115)
            for point in plan.curve
        ),
    )


def test_a_drawing_that_adapts_shrinks_and_has_no_ground_or_ink_of_its_own() -> None:
    alone, adapting = (drawings.breakdown(example_plan(), adapts=each) for each in (False, True))
    assert 'fill="#ffffff"/>' in alone and 'fill="#ffffff"/>' not in adapting
    assert "max-width:100%;height:auto" in adapting and 'viewBox="0 0 860 ' in adapting
    assert "currentColor" not in alone
    for colour in ("#1d2430", "#5b6678", "#e7eaef", "#b3261e"):
        assert colour in alone and colour not in adapting
    assert boxes_of_text(alone) == boxes_of_text(adapting)


def test_labels_never_overlap_each_other() -> None:
    tight = dataclasses.replace(example_plan(), ceiling=66, ceiling_at_least=66)
    ragged = ragged_plan(115, ((115,),)), ragged_plan(1, ((1,),))
    for plan in (example_plan(), tight, *ragged, of_many_samples()):
        for draw in (drawings.memory, drawings.breakdown, drawings.timeline):
            boxes = boxes_of_text(draw(plan))
            assert len(boxes) > 5
            for index, (said, left, right, top, bottom) in enumerate(boxes):
                assert left >= 0, said
                assert right <= 860, said
                for other, its_left, its_right, its_top, its_bottom in boxes[index + 1 :]:
                    across = left < its_right and its_left < right
                    assert not (across and top < its_bottom and its_top < bottom), (said, other)


def test_a_plan_without_trials_timeline_or_curve_still_reports(tmp_path: Path) -> None:
    plan = example_plan(
        trials=(), curve=(), timeline=Timeline(samples=(), marks=(), peak_event=0), versions={}
    )
    assert plan.report(tmp_path).exists()


def test_a_folder_that_cannot_be_written_is_a_file_error(tmp_path: Path) -> None:
    (tmp_path / "charts").write_text("in the way")
    with pytest.raises(FileError, match="charts"):
        example_plan().report(tmp_path)


def test_a_footprint_over_the_capacity_says_by_how_much() -> None:
    footprint = example_plan().ceiling_footprint
    document = footprint_summary(footprint, footprint.peak_device_bytes - 2**20)
    assert "1.00 MiB too much" in text.render(document)


def test_the_report_says_how_many_samples_are_in_batchnorms_statistics() -> None:
    report = markdown.render(full_report(ragged_plan(256, ((64,) * 4,), batchnorm_layers=53)))
    row = next(line for line in report.splitlines() if "each layer's statistics" in line)
    assert [cell.strip() for cell in row.strip("|").split("|")][1:] == ["256", "64"]
    assert "53 BatchNorm layers" in report


def test_empty_cells_of_sums_have_no_asterisks_and_their_figures_are_bold() -> None:
    report = markdown.render(full_report(example_plan()))
    sums = [line for line in report.splitlines() if line.startswith("| **= ")]
    assert sums and "****" not in report
    assert all(line.count("**") >= 4 for line in sums)


def test_one_of_anything_is_told_in_the_singular() -> None:
    plan = ragged_plan(1, ((1,),), parameters=1, trainable_parameters=1)
    for written in (markdown.render(full_report(plan)), text.render(full_report(plan))):
        told = " ".join(written.split())
        assert "1 parameter," in told and "the 1 sample." in told
        assert not re.search(r"(?<![\d,.])1 (samples|parameters|micro-batches|GPUs|ranks)\b", told)


def test_markdown_leaves_code_as_it_is() -> None:
    from autobatch.report import markdown

    assert markdown._escape("a_b `plan.scale_lr` *c*") == r"a\_b `plan.scale_lr` \*c\*"
    assert markdown._escape("a ` b_c") == r"a ` b\_c"
    assert markdown._escape("`a|b`") == r"`a\|b`"
