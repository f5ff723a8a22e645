from __future__ import annotations

import io

import pytest
from rich.console import Console

from autobatch.cli.terminal import draw, follow
from autobatch.records.progress import Progress
from autobatch.report.content import summary
from autobatch.report.document import Bullets, Document, Paragraph, Section, Table
from tests.support.plans import example_plan


def drawn(document: Document, width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width, record=True)
    draw(document, console)
    return console.export_text().splitlines()


@pytest.mark.parametrize("width", [60, 80, 120])
def test_every_row_of_an_account_is_one_line(width: int) -> None:
    lines = drawn(summary(example_plan()), width)
    assert all(len(line) <= width for line in lines)
    (row,) = [line for line in lines if line.startswith("cached by the allocator")]
    assert row.rstrip().endswith(("%", "▏", "▎"))


def test_bytes_give_way_where_they_do_not_fit_and_bars_come_where_they_do() -> None:
    plan = example_plan()
    exact = f"{plan.footprint.activations_bytes:,}"
    narrow, wide = (drawn(summary(plan), width) for width in (50, 120))
    assert not any(exact in line for line in narrow)
    (row,) = [line for line in wide if exact in line]
    share = plan.footprint.activations_bytes / plan.footprint.peak_device_bytes
    assert abs(row.count("█") - 20 * share) <= 1


def test_no_cell_and_no_subtitle_is_cut_off() -> None:
    cells = tuple(f"{number:,} ({number}-{number})" for number in range(1000, 1005))
    table = Table(tuple("abcde"), "r" * 5, (cells,))
    subtitle = "a subtitle of very many words, " * 5
    lines = drawn(Document("title", subtitle, (Section("", (table,)),)), 60)
    assert "…" not in "".join(lines)
    assert " ".join(subtitle.split()) in " ".join(" ".join(lines).split())
    assert all(f"1,00{last}" in " ".join(lines) for last in range(5))


def test_markup_in_a_document_is_text() -> None:
    document = Document(
        "[bold]t", "[red]s", (Section("[x]", (Paragraph("[b]p"), Bullets(("[i]",)))),)
    )
    text = "\n".join(drawn(document, 60))
    assert all(each in text for each in ("[bold]t", "[red]s", "[x]", "[b]p", "[i]"))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_steps_stay_on_a_terminal_where_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    stream = Terminal()
    with follow(stream, keeps=True) as progress:
        progress(Progress(step="running", executions=0, expected=3, micro_batch=2))
    assert stream.getvalue() == "1 of about 3: running, micro-batch 2\n"


def test_a_long_step_stays_in_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.delenv("NO_COLOR", raising=False)
    stream = Terminal()
    with follow(stream) as progress:
        progress(Progress(step="simulating " * 20, executions=0, expected=3, micro_batch=None))
    shown = stream.getvalue().partition("simulating")[2]
    assert "…" in shown and "\n" not in shown.partition("…")[0]
