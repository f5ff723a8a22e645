"""The page of a plan in a browser: what it shows, and that it answers as `autobatch.tune` does."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import autobatch
from autobatch import GpuSpec
from autobatch.errors import UsageError
from autobatch.gpus.uncertainty import likelihood_of
from autobatch.plan.plan import Plan
from autobatch.records.split import split
from autobatch.report.document import (
    Bullets,
    Chart,
    Code,
    Document,
    Facts,
    Paragraph,
    Section,
)
from autobatch.report.html import page, plan_page
from autobatch.support.units import GIB, KIB, MIB, format_bytes
from autobatch.workload.spec.load import load_spec
from tests.support.browser import Seen, axe, chromium, opened
from tests.support.plans import example_plan, ragged_plan

CARD = GpuSpec(name="few-fit", capacity_bytes=300 * MIB, context_bytes=20 * MIB)
HOSTILE = (
    "</script><script>window.harmed=1</script><img src=x onerror='window.harmed=1'>&amp;{{7*7}}"
)


def network() -> nn.Module:
    """About 12 MiB of activations for each sample, in blocks whose names are nested."""
    blocks = [
        nn.Sequential(nn.Conv2d(channels, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU())
        for channels in (3, 64, 64)
    ]
    return nn.Sequential(nn.Sequential(*blocks), nn.Flatten(), nn.Linear(64 * 64 * 64, 10))


def tuned(**options: Any) -> Plan:
    sample = torch.zeros(2, 3, 64, 64), torch.zeros(2, dtype=torch.int64)
    given = {"sample": sample, "loss": nn.CrossEntropyLoss(), "gpu": CARD, "target": 96}
    return autobatch.tune(network(), **given | options)


@pytest.fixture(scope="module")
def plan() -> Plan:
    return dataclasses.replace(tuned(), command="autobatch probe net.py:network --target 96")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def file(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(plan_page(plan), encoding="utf-8")
    return path


@pytest.fixture
def seen(browser: Any, file: Path) -> Iterator[Seen]:
    with opened(browser, file) as page:
        yield page


@pytest.mark.slow
def test_the_page_opens_from_disk_without_an_error_or_a_request(seen: Seen, file: Path) -> None:
    seen.page.click("#tab-lightning")
    seen.page.focus("#plot")
    seen.page.keyboard.press("p")
    assert seen.errors == []
    assert seen.requests == [file.as_uri()]


def test_the_answer_is_the_largest_text_of_the_page(seen: Seen, plan: Plan) -> None:
    sizes = seen(
        "[...document.querySelectorAll('main *')].filter(e => e.childNodes.length === 1)"
        ".map(e => [parseFloat(getComputedStyle(e).fontSize), e.textContent.trim()])"
    )
    largest = max(size for size, _ in sizes)
    shown = [text for size, text in sizes if size == largest]
    assert shown == [str(plan.micro_batch), str(plan.accumulation_steps), "1", "96"]


@pytest.mark.slow
def test_what_if_equals_tune_over_a_grid(seen: Seen, plan: Plan) -> None:
    own = plan.what_if.cards[0]
    targets = (2, 7, 24, 96, 97, 130, 1000)
    exact = 0
    indices = range(0, len(own.headrooms), max(1, len(own.headrooms) // 6))
    for number, index in enumerate(indices):
        for target in targets[number % 2 :: 2]:  # every other point of the grid
            told = seen("([h, t]) => autobatch.answers.planned(0, h, t)", [index, target])
            there = tuned(headroom=own.headrooms[index], target=target)
            assert told["ceiling"] == there.ceiling
            assert told["budget"] == there.budget_bytes
            assert told["split"]["microBatch"] == there.micro_batch
            assert told["split"]["steps"] == there.accumulation_steps
            if told["exact"]:
                exact += 1
                assert told["peak"] == there.footprint.peak_reserved_bytes
                assert told["likelihood"] == pytest.approx(there.likelihood, abs=1e-9)
            elif told["split"]["steps"] > 1:
                assert there.footprint.peak_reserved_bytes <= told["most"]
                assert told["likelihood"] <= there.likelihood
    assert exact > 10


@pytest.fixture
def gaps(browser: Any, plan: Plan, tmp_path: Path) -> Iterator[Seen]:
    """The page of a plan that knows every third micro-batch, from 2 on, and not the last ones."""
    page = tmp_path / "report.html"
    page.write_text(plan_page(knowing(plan, peaks_of(plan, slice(1, -4, 3)))), encoding="utf-8")
    with opened(browser, page) as seen:
        yield seen


def peaks_of(plan: Plan, which: slice = slice(None)) -> dict[int, int]:
    known = plan.what_if
    assert known is not None
    pairs = zip(known.micro_batches, known.peak_reserved_bytes, strict=True)
    return dict(sorted(pairs)[which])


def knowing(plan: Plan, peaks: dict[int, int]) -> Plan:
    assert plan.what_if is not None
    known = dataclasses.replace(
        plan.what_if,
        micro_batches=tuple(peaks),
        peak_reserved_bytes=tuple(peaks.values()),
    )
    return dataclasses.replace(plan, what_if=known)


def test_peaks_of_unknown_sizes_are_near_those_of_tune(gaps: Seen, plan: Plan) -> None:
    sizes = gaps("autobatch.answers.known.sizes")
    true = peaks_of(plan)
    assert sizes[0] == 2 and list(true)[:3] == [1, 2, 3]
    told = gaps("sizes => sizes.map(autobatch.answers.peak)", list(true))
    for (size, peak), found in zip(true.items(), told, strict=True):
        assert found["isKnown"] == (size in sizes)
        assert found["bytes"] == pytest.approx(peak, rel=0 if size in sizes else 0.3), size
        assert found["bytes"] <= found["most"]
    assert true[1] <= told[0]["most"] == true[2]


def test_a_slider_below_all_known_sizes_says_a_peak_that_can_be(gaps: Seen, plan: Plan) -> None:
    gaps.page.focus("#size")
    gaps.page.keyboard.press("Home")
    said = gaps.text("#by-hand")
    assert "1 × " in said and "about -" not in said
    assert f"up to {format_bytes(peaks_of(plan)[2])} reserved" in said
    assert "99 % likely" in said


def test_no_peak_is_below_nothing(browser: Any, plan: Plan, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    steep = {2: 10 * MIB, 3: 90 * MIB, 4: 60 * MIB}
    page.write_text(plan_page(knowing(plan, steep)), encoding="utf-8")
    with opened(browser, page) as seen:
        told = seen("[1, 2, 4, 5, 9].map(autobatch.answers.peak)")
        assert [found["bytes"] for found in told] == [size * MIB for size in (0, 10, 60, 85, 185)]
        assert told[0]["most"] == 10 * MIB


def test_splits_and_likelihoods_are_those_of_python(seen: Seen) -> None:
    cases = [
        (target, ceiling, ranks)
        for target in (*range(1, 70), 255, 256, 257, 1000, 1023, 4096, 2**20 + 1)
        for ceiling in (1, 2, 3, 7, 16, 31, 100)
        for ranks in (1, 2, 3, 8)
    ]
    told = seen("cases => cases.map(c => autobatch.answers.splitTarget(...c))", cases)
    for (target, ceiling, ranks), found in zip(cases, told, strict=True):
        try:
            expected = split(target, ceiling=ceiling, world_size=ranks)
        except UsageError:
            assert found is None
            continue
        got = found["microBatch"], found["steps"], found["uniform"]
        assert got == (expected.micro_batch, expected.accumulation_steps, expected.uniform)
    pairs = [(usable, context) for usable in range(80, 130) for context in (0, 5, 20)]
    cards = [{"capacity": usable + context, "context": context} for usable, context in pairs]
    likely = seen("cards => cards.map(c => autobatch.answers.likelihood(100, c))", cards)
    assert likely == pytest.approx(
        [likelihood_of(100, usable, context_bytes=context) for usable, context in pairs]
    )
    assert {0.95, 0.99} <= set(likely)


def test_sliders_move_the_answer_and_go_back(seen: Seen, plan: Plan) -> None:
    as_planned = seen.text("#outcome")
    assert f"{plan.micro_batch} × {plan.accumulation_steps} × 1 = 96" in as_planned
    assert format_bytes(plan.footprint.peak_reserved_bytes) in as_planned
    seen.page.focus("#headroom")
    seen.page.keyboard.press("End")
    own = plan.what_if.cards[0]
    assert f"ceiling {own.ceilings[-1]};" in seen.text("#outcome")
    seen.page.fill("#target", "97")
    assert "= 97" in seen.text("#outcome")
    seen.page.focus("#size")
    seen.page.keyboard.press("End")
    assert "over the budget" in seen.text("#by-hand")
    seen.page.click("#reset")
    assert seen.text("#outcome") == as_planned


def test_by_hand_and_the_plan_agree_where_they_are_the_same_window(
    browser: Any, tmp_path: Path
) -> None:
    plan = tuned(target=3)
    assert plan.accumulation_steps == 1
    peak = format_bytes(plan.footprint.peak_reserved_bytes)
    page = tmp_path / "report.html"
    page.write_text(plan_page(knowing(plan, {1: 60 * MIB, 8: 250 * MIB})), encoding="utf-8")
    with opened(browser, page) as seen:
        assert f"; {peak} reserved of " in seen.text("#outcome")
        assert f"= 3{peak} reserved: " in seen.text("#by-hand")
        for likely in re.findall(r"[\d.]+ % likely", seen.text("#outcome")):
            assert likely in seen.text("#by-hand")
        seen.page.focus("#steps")
        seen.page.keyboard.press("ArrowRight")
        assert "about" in seen.text("#by-hand")


def test_the_timeline_tells_what_happens_where_the_pointer_is(seen: Seen, plan: Plan) -> None:
    assert f"Event {plan.timeline.peak_event:,} of" in seen.text("#readout")
    assert format_bytes(plan.footprint.peak_allocated_bytes) in seen.text("#readout")
    before = seen.text("#readout")
    seen.page.locator("#plot").scroll_into_view_if_needed()
    box = seen.page.locator("#plot").bounding_box()
    seen.page.mouse.move(box["x"] + box["width"] * 0.3, box["y"] + 50)
    after = seen.text("#readout")
    assert after != before
    assert re.search(r"(forward|backward) of micro-batch \d, window \d|step of window \d", after)
    assert re.search(r"large block: |Allocates ", after)


def test_phases_that_belong_to_no_micro_batch_name_their_window_alone(seen: Seen) -> None:
    texts = seen(
        "[...document.querySelectorAll('#ribbon span')].map(e => [e.title, e.textContent])"
    )
    titles = [title for title, _ in texts]
    assert "setup, before window 1" in titles or titles[0].startswith("inputs")
    assert {"step of window 1", "step of window 2", "forward of micro-batch 2, window 1"} <= {
        *titles
    }
    assert not any("step" in title and "micro-batch" in title for title in titles)
    assert not any(re.match(r"(step|setup) \d\.", text) for _, text in texts)
    seen.page.focus("#plot")
    seen.page.keyboard.press("Home")
    assert "setup, before window 1" in seen.text("#readout")
    still = plan_page(example_plan())
    assert 'title="step, window 1"' in still and 'title="forward, window 1, micro-batch 1"' in still


def test_bytes_are_written_as_python_writes_them_halves_included(seen: Seen) -> None:
    halves = [
        sign * int(scale * half / 10**digits)
        for scale in (KIB, MIB, GIB)
        for digits, end in ((2, 10), (1, 100), (0, 1000))
        for half in (end * 10**digits / 8 + step + 0.5 for step in range(0, 64))
        for sign in (1, -1)
    ]
    eighths = [17_039_360, *(MIB * eighth // 8 for eighth in range(8, 900))]
    around = [scale + near for scale in (KIB, MIB, GIB, 10 * MIB, 100 * GIB) for near in (-1, 0, 1)]
    sizes = [0, 1, 1023, *eighths, *halves, *around, *(7**power for power in range(15))]
    told = seen("sizes => sizes.map(autobatch.formatBytes)", sizes)
    assert told == [format_bytes(size) for size in sizes]
    assert format_bytes(17_039_360) == "16.2 MiB"  # 16.25: toFixed would say 16.3


def test_a_target_above_a_million_opens_with_the_answer_of_the_page(
    browser: Any, tmp_path: Path
) -> None:
    model = nn.Sequential(nn.Linear(4096, 64), nn.ReLU(), nn.Linear(64, 8))
    sample = torch.zeros(2, 4096), torch.zeros(2, dtype=torch.int64)
    large = autobatch.tune(
        model, sample=sample, loss=nn.CrossEntropyLoss(), gpu="2GiB", target=1_500_000
    )
    page = tmp_path / "report.html"
    page.write_text(plan_page(large), encoding="utf-8")
    with opened(browser, page) as seen:
        answer = f"{large.micro_batch:,} × {large.accumulation_steps:,} × 1 = 1,500,000"
        assert large.split.uniform and answer in seen.text("#outcome")
        assert seen("document.getElementById('target').checkValidity()")
        seen.page.fill("#target", "2000000")
        assert "= 1,500,000" in seen.text("#outcome")


def test_as_many_samples_as_gpus_are_answered_as_tune_answers(browser: Any, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text(plan_page(tuned(world_size=3, sharding="ddp")), encoding="utf-8")
    there = tuned(world_size=3, sharding="ddp", target=3)
    with opened(browser, page) as seen:
        assert seen("autobatch.answers.planned(0, 0, 2).split") is None  # as tune refuses
        seen.page.fill("#target", "3")
        assert "1 × 1 × 3 = 3" in seen.text("#outcome")
        known = re.search(r"ceiling at least (\d+)", seen.text("#outcome"))
        assert known is not None and int(known[1]) <= there.ceiling_at_least
        assert (there.micro_batch, there.accumulation_steps) == (1, 1)


def test_what_is_allocated_is_reserved_at_every_event(seen: Seen, plan: Plan) -> None:
    points = seen("() => autobatch.history.pointsIn(0, autobatch.data.lives.events - 1)")
    assert len(points) > 2 * len(plan.timeline.samples) or len(points) > 100
    assert all(point["allocated"] <= point["reserved"] for point in points)
    reserved = {sample.event: sample.reserved_bytes for sample in plan.timeline.samples}
    shown = {point["event"]: point["reserved"] for point in points if point["event"] in reserved}
    assert shown == {event: reserved[event] for event in shown} and len(shown) > 10


def test_the_timeline_is_worked_with_the_keyboard(seen: Seen, plan: Plan) -> None:
    plot = seen.page.locator("#plot")
    plot.focus()
    at = int(plot.get_attribute("aria-valuenow"))
    assert at == plan.timeline.peak_event
    seen.page.keyboard.press("Control+ArrowLeft")
    assert int(plot.get_attribute("aria-valuenow")) == at - 1
    assert "By module at event" in seen.text("#icicle-title")
    seen.page.keyboard.press("Home")
    assert f"Event {plan.timeline.samples[0].event} of" in plot.get_attribute("aria-valuetext")
    whole = seen("document.querySelector('#areas path').getAttribute('d')")
    seen.page.keyboard.press("p")
    assert int(plot.get_attribute("aria-valuenow")) == plan.timeline.peak_event
    assert seen("document.querySelector('#areas path').getAttribute('d')") != whole
    assert seen.text("#icicle-title") == "By module at the peak"
    seen.page.keyboard.press("0")
    assert seen("document.querySelector('#areas path').getAttribute('d')") == whole


def test_dragging_zooms_and_a_double_click_goes_back(seen: Seen) -> None:
    plot = seen.page.locator("#plot")
    plot.scroll_into_view_if_needed()
    box, mouse = plot.bounding_box(), seen.page.mouse
    labels = "[...document.querySelectorAll('#ribbon span')].map(e => e.title)"
    whole = seen(labels)
    mouse.move(box["x"] + box["width"] * 0.40, box["y"] + 60)
    mouse.down()
    mouse.move(box["x"] + box["width"] * 0.45, box["y"] + 60)
    mouse.up()
    assert len(seen(labels)) < len(whole)
    mouse.dblclick(box["x"] + 50, box["y"] + 60)
    assert seen(labels) == whole


def test_the_peak_can_be_seen_however_narrow_it_is(seen: Seen, plan: Plan) -> None:
    drawn = seen("document.querySelector('#areas path').getAttribute('d')")
    highest = min(float(y) for y in re.findall(r"[V ](\d+\.\d)", drawn))
    top = 1.06 * max(sample.reserved_bytes for sample in plan.timeline.samples)
    assert highest == pytest.approx(300 * (1 - plan.footprint.peak_allocated_bytes / top), abs=0.1)


def test_modules_at_the_peak_sum_to_it_and_can_be_walked(seen: Seen, plan: Plan) -> None:
    peak = format_bytes(plan.footprint.peak_allocated_bytes)
    first = seen.page.locator("#tree [role=treeitem]").first
    assert first.get_attribute("aria-label").startswith(f"Everything: {peak}, 100 %")
    first.focus()
    seen.page.keyboard.press("ArrowDown")
    inner = seen("document.activeElement.getAttribute('aria-label')")
    assert inner.startswith(("0:", "outside of modules:", "2:"))
    assert inner in seen.text("#crumbs")
    seen.page.keyboard.press("Enter")
    assert (
        seen("document.querySelector('#tree [role=treeitem]').getAttribute('aria-label')") == inner
    )
    seen.page.keyboard.press("Escape")
    assert first.get_attribute("aria-label").startswith("Everything")


def test_rounding_is_beside_the_modules_at_the_peak(
    browser: Any, plan: Plan, tmp_path: Path
) -> None:
    largest, *others = plan.peak_blocks
    less = dataclasses.replace(largest, size_bytes=largest.size_bytes - 10 * MIB)
    known = sum(blocks.size_bytes for blocks in plan.peak_blocks) - 10 * MIB
    rounding = plan.footprint.peak_allocated_bytes - known
    page = tmp_path / "report.html"
    changed = dataclasses.replace(plan, peak_blocks=(less, *others))
    page.write_text(plan_page(changed), encoding="utf-8")
    with opened(browser, page) as seen:
        whole, *inner = (
            each.get_attribute("aria-label")
            for each in seen.page.locator("#tree [role=treeitem]").all()
        )
        assert seen.errors == []
    assert whole.startswith(f"Everything: {format_bytes(plan.footprint.peak_allocated_bytes)}")
    (told,) = (label for label in inner if label.startswith("rounding"))
    assert told.startswith(f"rounding by the allocator: {format_bytes(rounding)}, ")


def test_tabs_show_the_lines_of_each_trainer_and_buttons_copy_them(
    browser: Any, file: Path, plan: Plan
) -> None:
    permissions = ["clipboard-read", "clipboard-write"]
    with opened(browser, file, permissions=permissions) as seen:
        seen.page.focus("#tab-windows")
        for name in ("plain", "transformers", "lightning", "accelerate", "torchrun"):
            seen.page.keyboard.press("ArrowRight")
            assert seen.page.is_visible(f"#panel-{name}")
            assert not seen.page.is_visible("#panel-windows")
        seen.page.click("#panel-torchrun .copy")
        seen.page.wait_for_function(
            "document.querySelector('#panel-torchrun .copy').textContent === 'Copied'"
        )
        assert seen("navigator.clipboard.readText()") == seen.text("#panel-torchrun pre code")
        assert plan.command in seen.text("#next")


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nobody_is_shut_out_on_any_screen(
    browser: Any, file: Path, width: int, scheme: str
) -> None:
    with opened(browser, file, width=width, color_scheme=scheme, bypass_csp=True) as seen:
        seen(axe())
        found = seen("axe.run()")
        assert len(found["passes"]) > 20
        assert [(each["id"], each["nodes"][0]["html"]) for each in found["violations"]] == []


def test_a_phone_shows_all_without_moving_sideways(browser: Any, file: Path) -> None:
    with opened(browser, file, width=390) as seen:
        assert seen("document.documentElement.scrollWidth") == 390
        cut = seen(
            "[...document.querySelectorAll('.scroll, pre, .readout, .outcome')]"
            ".filter(e => e.scrollWidth > e.clientWidth + 1).map(e => e.outerHTML.slice(0, 80))"
        )
        assert cut == []
        smallest = seen(
            "Math.min(...[...document.querySelectorAll('main *')]"
            ".filter(e => [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()))"
            ".map(e => parseFloat(getComputedStyle(e).fontSize)))"
        )
        assert smallest >= 11


LONG = "a_name_without_any_place_to_break_" * 8


@pytest.mark.parametrize("kind", ["plan", "document"])
def test_long_words_and_code_do_not_move_a_phone_sideways(
    kind: str, browser: Any, plan: Plan, tmp_path: Path
) -> None:
    told = (f"pass `{LONG}`", LONG, f"see https://example.org/{LONG}")
    facts = dataclasses.replace(plan.model, name=LONG, optimizer=LONG)
    if kind == "plan":
        text = plan_page(dataclasses.replace(plan, warnings=told, notes=told, model=facts))
    else:
        blocks = (Paragraph(told[0]), Bullets(told), Facts(((LONG, told[1]),)), Code(LONG))
        text = page(Document(LONG, LONG, (Section(LONG, blocks),)), {})
    made = tmp_path / "report.html"
    made.write_text(text, encoding="utf-8")
    with opened(browser, made, width=390) as seen:
        assert seen("document.documentElement.scrollWidth") == 390


@pytest.mark.parametrize("width", [390, 1400])
def test_a_drawing_that_scrolls_is_reached_with_the_keyboard(
    width: int, browser: Any, tmp_path: Path
) -> None:
    drawing = '<svg viewBox="0 0 860 300"><rect width="860" height="300"/></svg>'
    document = Document("t", "s", (Section("h", (Chart("memory", "what it shows"),)),))
    made = tmp_path / "report.html"
    made.write_text(page(document, {"memory": drawing}), encoding="utf-8")
    with opened(browser, made, width=width, bypass_csp=True) as seen:
        drawn = "document.querySelector('.drawing')"
        assert seen(f"{drawn}.scrollWidth > {drawn}.clientWidth") == (width == 390)
        seen(axe())
        found = seen("axe.run()")
        assert [(each["id"], each["nodes"][0]["html"]) for each in found["violations"]] == []


@pytest.mark.parametrize("width", [390, 700, 1400])
def test_buttons_that_copy_cover_no_text(
    width: int, browser: Any, plan: Plan, tmp_path: Path
) -> None:
    long = dataclasses.replace(plan, command=f"autobatch probe net.py:f --target 96 {LONG * 3}")
    made = tmp_path / "report.html"
    made.write_text(plan_page(long), encoding="utf-8")
    with opened(browser, made, width=width) as seen:
        covered = seen(
            """[...document.querySelectorAll('.copyable')].filter(e => e.offsetParent).filter(e => {
              const button = e.querySelector('button').getBoundingClientRect();
              const code = e.querySelector('pre').getBoundingClientRect();
              return button.left < code.right && code.left < button.right
                && button.top < code.bottom && code.top < button.bottom;
            }).map(e => e.textContent.slice(0, 60))"""
        )
        assert covered == []
        command = ".copyable.command pre"
        assert seen(f"(e => e.scrollWidth <= e.clientWidth)(document.querySelector('{command}'))")


def test_dark_differs_from_light(browser: Any, file: Path) -> None:
    seen_in = {}
    for scheme in ("light", "dark"):
        with opened(browser, file, color_scheme=scheme) as seen:
            seen_in[scheme] = seen(
                "[document.body, document.querySelector('.c-parameters')]"
                ".map(e => getComputedStyle(e).backgroundColor)"
            )
    assert all(light != dark for light, dark in zip(*seen_in.values(), strict=True))


def test_it_prints_on_at_most_four_pages_with_all_that_is_closed_open(
    browser: Any, file: Path
) -> None:
    with opened(browser, file, width=390) as seen:
        assert seen("[...document.querySelectorAll('details')].some(e => !e.open)")
        printed = seen.page.pdf(format="A4", print_background=True)
        assert 1 < len(re.findall(rb"/Type\s*/Page\b", printed)) <= 4
        seen.page.emulate_media(media="print")
        seen("dispatchEvent(new Event('beforeprint'))")
        assert seen("[...document.querySelectorAll('details')].every(e => e.open)")
        assert (
            seen("getComputedStyle(document.querySelector('.answer .n')).color") == "rgb(0, 0, 0)"
        )


@pytest.mark.slow
def test_a_model_with_long_names_and_many_kinds_of_blocks_prints_on_four_pages_too(
    browser: Any, tmp_path: Path
) -> None:
    pytest.importorskip("transformers")
    plan = autobatch.tune(load_spec("hf:bert?num_hidden_layers=3"), target=256, gpu="a100-40gb")
    file = tmp_path / "bert.html"
    file.write_text(plan_page(plan), encoding="utf-8")
    with opened(browser, file) as seen:
        printed = seen.page.pdf(format="A4", print_background=True)
    assert len(plan.warnings) == 0 and len(printed) > 100_000  # columns come out empty
    assert 1 < len(re.findall(rb"/Type\s*/Page\b", printed)) <= 4


def test_without_scripts_the_answer_the_tables_and_still_drawings_are_there(
    browser: Any, file: Path, plan: Plan
) -> None:
    with opened(browser, file, java_script_enabled=False) as seen:
        assert seen.page.is_visible(".answer")
        assert seen.page.locator("#areas path").count() >= 4
        assert seen.page.locator("#curve-line").get_attribute("d").startswith("M")
        assert seen.page.is_visible("#panel-windows")
        assert seen.page.is_visible("#panel-lightning")
        assert not seen.page.is_visible("#headroom")
        assert not seen.page.is_visible(".copy >> nth=0")
        assert seen.page.locator("#blocks tbody tr").count() > 5


def test_hostile_strings_of_a_plan_stay_text(browser: Any, plan: Plan, tmp_path: Path) -> None:
    holder = dataclasses.replace(
        plan.peak_blocks[0].holder, module=HOSTILE, op=HOSTILE, where=HOSTILE
    )
    hostile = dataclasses.replace(
        plan,
        command=HOSTILE,
        warnings=(HOSTILE,),
        notes=(HOSTILE,),
        model=dataclasses.replace(plan.model, name=HOSTILE, optimizer=HOSTILE),
        gpu=dataclasses.replace(plan.gpu, name=HOSTILE),
        peak_blocks=(dataclasses.replace(plan.peak_blocks[0], holder=holder), *plan.peak_blocks),
        lives=dataclasses.replace(plan.lives, holders=(holder,) * len(plan.lives.holders)),
        timeline=dataclasses.replace(
            plan.timeline,
            marks=tuple((e, HOSTILE, w, m) for e, _, w, m in plan.timeline.marks),
        ),
        what_if=dataclasses.replace(
            plan.what_if,
            cards=tuple(dataclasses.replace(c, name=HOSTILE) for c in plan.what_if.cards),
        ),
    )
    page = tmp_path / "report.html"
    page.write_text(plan_page(hostile), encoding="utf-8")
    with opened(browser, page) as seen:
        seen.page.focus("#plot")
        seen.page.keyboard.press("Home")
        assert seen("window.harmed") is None
        assert seen("document.querySelectorAll('img').length") == 0
        assert seen.requests == [page.as_uri()]
        assert seen.errors == []
        assert HOSTILE in seen.text("#warnings")
        assert HOSTILE in seen.text("#readout")


def test_scripts_that_get_into_the_page_are_not_run(
    browser: Any, file: Path, tmp_path: Path
) -> None:
    page = tmp_path / "report.html"
    harmed = file.read_text(encoding="utf-8").replace(
        "</main>", "<script>window.harmed = 1</script></main>"
    )
    page.write_text(harmed, encoding="utf-8")
    with opened(browser, page) as seen:
        assert seen("window.harmed") is None
        assert seen("typeof window.autobatch") == "object"


def test_older_plans_have_a_page_without_what_they_do_not_know(
    browser: Any, tmp_path: Path
) -> None:
    for number, old in enumerate((example_plan(), ragged_plan(257, ((65, 64), (64, 64))))):
        page = tmp_path / f"{number}.html"
        page.write_text(plan_page(old), encoding="utf-8")
        with opened(browser, page) as seen:
            assert seen.errors == []
            assert seen.page.locator("#tree, #blocks, #headroom").count() == 0
            assert seen.page.is_visible("#curve")
            seen.page.focus("#plot")
            seen.page.keyboard.press("End")
            assert "Event " in seen.text("#readout")


def test_the_data_in_the_page_is_json_that_cannot_end_its_element(plan: Plan) -> None:
    hostile = dataclasses.replace(plan, gpu=dataclasses.replace(plan.gpu, name=HOSTILE))
    text = plan_page(hostile)
    data = text.split('id="data">')[1].split("</script>")[0]
    assert "<" not in data
    assert json.loads(data)["plan"]["gpu"] == HOSTILE


def test_amber_is_for_what_must_be_acted_on() -> None:
    noted = plan_page(dataclasses.replace(example_plan(), warnings=(), notes=("assumed so",)))
    assert 'class="warnings"' not in noted
    assert "assumed so" in noted
    assert 'class="warnings"' in plan_page(example_plan())
