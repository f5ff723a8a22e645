"""That tables and charts fit the screen and the paper, in the dark too."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from autobatch.plan.plan import Plan
from autobatch.records.holders import Holder, PeakBlocks
from autobatch.report import colours
from autobatch.report.charts.choices import FrontierChart, draw_frontier
from autobatch.report.charts.frame import save, style
from autobatch.report.document import Chart, Document, Section, Table
from autobatch.report.html import page, plan_page
from tests.support.browser import chromium, opened
from tests.support.plans import example_plan

ADAPTER = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default"
LONG = ADAPTER + "." + "a_module_name_that_nobody_would_type_" * 4
LEAST_CONTRAST = 3
"""Of lines and marks, by the Web Content Accessibility Guidelines."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as started:
        yield started


def with_blocks(module: str) -> Plan:
    plan = example_plan()
    blocks = tuple(
        PeakBlocks(
            holder=Holder(
                module=module.replace("0", str(number)) + "." + "xyz"[number],
                op="_scaled_dot_product_efficient_attention",
                category="activations",
                phase="forward",
                shape=(64, 4, 1024, 1024),
                dtype="bfloat16",
                where="train/some_model.py:120",
            ),
            count=2,
            size_bytes=plan.footprint.peak_allocated_bytes // 4,
        )
        for number in range(3)
    )
    return dataclasses.replace(plan, peak_blocks=blocks)


def written(text: str, folder: Path) -> Path:
    file = folder / "report.html"
    file.write_text(text, encoding="utf-8")
    return file


WIDER = """[...document.querySelectorAll('.scroll')].filter(e => e.getBoundingClientRect().width)
    .filter(e => e.scrollWidth > e.clientWidth + 1).map(e => e.textContent.slice(0, 80))"""
BROKEN_WORDS = """[...document.querySelectorAll('#blocks tbody th')].filter(e => {
    const text = e.firstChild, at = text.data.indexOf('bfloat16'), range = document.createRange();
    if (at < 0) return false;
    range.setStart(text, at); range.setEnd(text, at + 8);
    return range.getClientRects().length > 1;
}).length"""


@pytest.mark.parametrize("module", [ADAPTER, LONG])
@pytest.mark.parametrize("width", [390, 800, 1000, 1400])
def test_a_table_of_long_names_is_as_wide_as_its_box_and_breaks_no_word(
    width: int, module: str, browser: Any, tmp_path: Path
) -> None:
    file = written(plan_page(with_blocks(module)), tmp_path)
    with opened(browser, file, width=width) as seen:
        assert seen(WIDER) == []
        assert seen(BROKEN_WORDS) == 0
        if width > 860:
            cells = "[...document.querySelectorAll('#blocks tbody td:last-child')]"
            right = seen("document.getElementById('blocks').getBoundingClientRect().right")
            assert seen(f"Math.max(...{cells}.map(e => e.getBoundingClientRect().right))") <= right


@pytest.mark.parametrize("module", [ADAPTER, LONG])
def test_no_column_is_cut_off_on_paper(module: str, browser: Any, tmp_path: Path) -> None:
    file = written(plan_page(with_blocks(module)), tmp_path)
    with opened(browser, file, width=700) as seen:
        seen.page.emulate_media(media="print")
        ends = seen(
            "[...document.querySelectorAll('table')].map(e => e.getBoundingClientRect().right)"
        )
        assert max(ends) <= 701


def test_names_of_phases_are_not_cut_on_paper_which_is_narrower(
    browser: Any, tmp_path: Path
) -> None:
    cut = (
        "[...document.querySelectorAll('#ribbon span')]"
        ".filter(e => e.scrollWidth > e.clientWidth + 1)"
        ".map(e => [e.dataset.name, e.scrollWidth, e.clientWidth])"
    )
    shown = (
        "[...document.querySelectorAll('#ribbon span')]"
        ".map(e => getComputedStyle(e, '::before').content).join('')"
    )
    with opened(browser, written(plan_page(example_plan()), tmp_path)) as seen:
        assert seen(cut) == []
        wide = seen(shown)
        assert "fwd" in wide
        for width in range(200, 720, 40):
            seen.page.set_viewport_size({"width": width, "height": 900})
            seen.page.emulate_media(media="print")
            assert seen(cut) == [], width
            assert len(seen(shown)) <= len(wide)


def test_the_curve_is_on_one_sheet_with_its_axis_and_no_sum_stands_alone(
    browser: Any, tmp_path: Path
) -> None:
    with opened(browser, written(plan_page(example_plan()), tmp_path)) as seen:
        seen.page.emulate_media(media="print")
        kept = "document.getElementById('curve').closest('.keep')"
        assert seen(f"getComputedStyle({kept}).breakInside") == "avoid"
        assert seen(f"{kept}.querySelectorAll('.columns, .axis, .legend').length") == 3
        last = "document.querySelector('.account tbody tr:last-child')"
        assert seen(f"getComputedStyle({last}).breakBefore") == "avoid"


def drawn(folder: Path) -> str:
    chart = FrontierChart(
        parameter="seq",
        ceilings=((128, 64), (256, 32)),
        unbounded=frozenset({128}),
        planned=((128, 32), (256, 32)),
        paces=((128, 10.0), (256, 9.0)),
        unit="tokens",
        evidence="estimate",
    )
    with style():
        return save(draw_frontier(chart), folder, "frontier")


def chart_page(folder: Path) -> str:
    blocks = (Chart("frontier", "what it shows"),)
    return page(Document("t", "s", (Section("h", blocks),)), {"frontier": drawn(folder)})


def test_no_line_of_a_chart_keeps_a_colour_that_the_dark_hides(tmp_path: Path) -> None:
    text = chart_page(tmp_path)
    drawing = text[text.index("<svg") :].lower()
    assert not [
        colour
        for colour in (*colours.CATEGORIES.values(), colours.BUDGET, colours.BAND, colours.INK)
        if colour in drawing
    ]
    dark = text[text.index("prefers-color-scheme: dark") :]
    shades = dict(re.findall(r"(--[\w-]+): (#[0-9a-f]{6})", dark[: dark.index("box-sizing")]))
    areas = {"--c-cached"}  # no line or mark has it
    names = {name for name in shades if name.startswith("--c-")} | {"--budget", "--band", "--ink"}
    for name in names - areas:
        assert contrast(shades[name], shades["--card"]) >= LEAST_CONTRAST, name


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def luminance(colour: str) -> float:
    shares = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    red, green, blue = (
        share / 12.92 if share <= 0.03928 else ((share + 0.055) / 1.055) ** 2.4 for share in shares
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_a_chart_that_scrolls_on_a_phone_says_so(browser: Any, tmp_path: Path) -> None:
    file = written(chart_page(tmp_path), tmp_path)
    hint = "figcaption .narrow"
    for width in (390, 1400):
        with opened(browser, file, width=width) as seen:
            assert seen.page.is_visible(hint) == (width == 390)
            assert seen("document.documentElement.scrollWidth") == width
            ground = "getComputedStyle(document.querySelector('.drawing')).backgroundAttachment"
            assert seen(ground).count("local") == 2


def test_what_is_folded_opens_on_request_and_takes_no_paper(browser: Any, tmp_path: Path) -> None:
    table = Table(("a", "b"), "lr", tuple((str(row), "1") for row in range(400)))
    file = written(page(Document("t", "s", (Section("h", (table,), True),)), {}), tmp_path)
    with opened(browser, file) as seen:
        printed = seen.page.pdf(format="A4")
        assert len(re.findall(rb"/Type\s*/Page\b", printed)) == 1
        assert not seen.page.is_visible("td >> nth=0")
        seen.page.click("summary h2")
        assert seen.page.is_visible("td >> nth=0")


def test_a_page_without_sliders_promises_none_and_says_why() -> None:
    plan = dataclasses.replace(example_plan(), what_if=None)
    stopped = dataclasses.replace(plan, ceiling=None)
    for each in (plan, stopped):
        text = plan_page(each)
        assert '<a href="#what-if">Why this micro-batch</a>' in text
        assert "What if</" not in text
        assert text.count("There are no sliders here: ") == 1
    assert (
        f"the search stopped at micro-batch {stopped.ceiling_at_least:,} without an end"
        in plan_page(stopped)
    )
