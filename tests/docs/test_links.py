from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import urlparse

import pytest

from tests.docs.blocks import PAGES, blocks_of, headings_of, links_of
from tests.support import ROOT

LANGUAGES = {"python", "shell", "text", "toml", "json", "yaml"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_to_a_file_and_a_heading_that_are_there(page: Path) -> None:
    for link in links_of(page):
        parts = urlparse(link)
        if parts.scheme:
            continue
        target = (page.parent / parts.path).resolve() if parts.path else page
        assert target.exists(), link
        assert target.is_relative_to(ROOT), link
        if parts.fragment:
            assert parts.fragment in headings_of(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_says_what_it_is(page: Path) -> None:
    for block in blocks_of(page):
        assert block.language in LANGUAGES, str(block)


def test_every_page_of_the_docs_is_in_the_site() -> None:
    listed = set(re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text()))
    docs = ROOT / "docs"
    assert listed == {str(page.relative_to(docs)) for page in docs.rglob("*.md")}


def test_extras_that_pages_name_exist() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    for page in PAGES:
        for names in re.findall(r"(?:autobatch-gpu|\"\.)\[([\w,]+)\]", page.read_text()):
            assert set(names.split(",")) <= set(extras), page


def test_quickstarts_are_short() -> None:
    text = (ROOT / "README.md").read_text()
    start = text.count("\n", 0, text.index("## Quickstarts"))
    end = text.count("\n", 0, text.index("## What you get"))
    quickstarts = [b for b in blocks_of(ROOT / "README.md") if start < b.line < end]
    assert len(quickstarts) >= 8
    for block in quickstarts:
        lines = [line for line in block.text.splitlines() if line.strip()]
        assert len(lines) <= 12, str(block)
