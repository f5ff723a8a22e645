"""A footprint in a REPL and in a notebook."""

from __future__ import annotations

import dataclasses
import re
from html.parser import HTMLParser

from tests.support.plans import footprint_at


class Nested(HTMLParser):
    """Fails at a tag that ends another element than the innermost one, and keeps the text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data.strip())


def test_the_repr_is_one_line_with_the_answer() -> None:
    shown = repr(footprint_at(64))
    assert "\n" not in shown and len(shown) < 200
    assert shown.startswith("<Footprint of micro-batch 64 x 4 on a100-40gb: ")
    assert repr([footprint_at(64)]) == f"[{shown}]"


def test_two_steps_that_were_run_are_not_told_as_those_of_the_plan() -> None:
    ran = footprint_at(64, steps=2)
    assert repr(ran).startswith("<Footprint of micro-batch 64 x 2 or more on a100-40gb: ")
    assert str(ran).startswith("micro-batch 64 x 2 or more on a100-40gb (simulated)\n")
    assert "micro-batch 64, 2 or more accumulation steps on" in ran._repr_html_()
    assert "micro-batch 64, 1 accumulation step on" in footprint_at(64, steps=1)._repr_html_()


def test_the_notebook_form_is_well_formed_and_escaped() -> None:
    footprint = dataclasses.replace(footprint_at(64), gpu="<script>alert(1)</script>")
    fragment = footprint._repr_html_()
    assert "<script>" not in fragment
    parsed = Nested()
    parsed.feed(fragment)
    parsed.close()
    assert parsed.open == []
    assert any("<script>alert(1)</script>" in words for words in parsed.words)
    assert "activations" in parsed.words and "on the device" in parsed.words


def test_the_answer_is_the_largest_text_and_bars_follow_one_another() -> None:
    fragment = footprint_at(64)._repr_html_()
    sizes = [float(size) for size in re.findall(r"font-size: ([\d.]+)em", fragment)]
    assert sizes == [1.6] and "<h" not in fragment
    bars = [
        (float(start), float(width))
        for start, width in re.findall(r"margin-left: ([\d.]+)%; width: ([\d.]+)%", fragment)
    ]
    assert max(start + width for start, width in bars) <= 100.05
    assert bars[-1] == (0, 100)
    assert bars[1][0] == bars[0][1]
