from __future__ import annotations

import io

import pytest
from rich.console import Console

from autobatch.cli.columns import records_of
from autobatch.cli.terminal import draw, follow
from autobatch.gpus.catalogue import CATALOGUE
from autobatch.records.progress import Progress
from autobatch.report.content import summary
from autobatch.report.document import Bullets, Document, Paragraph, Section, Table
from autobatch.report.gpu_list import gpu_list
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


_CARDS = Table(
    ("card", "memory", "micro-batch", "steps", "ceiling", "est. s/window", "est. cost/1M"),
    "lrrrrrr",
    (
        ("t4", "14.6 GiB", "64", "1", "261", "0.0334 (0.0294-0.0380)", "0.043"),
        ("rtx-2080-ti", "10.6 GiB", "64", "16", "1,024", "0.0107 (0.00940-0.0122)", "-"),
    ),
)
_LEVERS = Table(
    ("lever", "ceiling", "saved", "numbers"),
    "lrrl",
    (
        ("lora: rank 16, all linear + checkpointing: every 2nd block", "1,234,567", "", "same"),
        ("allocator: expandable segments", "261", "790 MiB", "other"),
    ),
)


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize(
    "table", [_CARDS, _LEVERS, gpu_list(CATALOGUE.values(), ()).sections[0].blocks[0]]
)
def test_no_word_and_no_number_of_a_table_is_broken(table: Table, width: int) -> None:
    lines = drawn(Document("title", "subtitle", (Section("", (table,)),)), width)
    assert all(len(line) <= width for line in lines)
    words = " ".join(lines).split()
    for row in (table.columns[1:], *table.rows):  # a record has no name for its title
        for cell in row:
            assert set(cell.split()) <= set(words), cell
    # a size stays beside its unit
    assert all(any(cell in line for line in lines) for row in table.rows for cell in row[1:3])


def test_a_table_that_is_too_wide_is_shown_record_by_record_without_empty_cells() -> None:
    lines = [
        line.rstrip() for line in drawn(Document("t", "s", (Section("", (_CARDS, _LEVERS)),)), 60)
    ]
    at = lines.index("t4")
    assert lines[at + 1 : at + 4] == [
        "  memory 14.6 GiB   micro-batch 64   steps 1   ceiling 261",
        "  est. s/window 0.0334 (0.0294-0.0380)   est. cost/1M 0.043",
        "rtx-2080-ti",
    ]
    narrow = [line.rstrip() for line in drawn(Document("t", "s", (Section("", (_LEVERS,)),)), 40)]
    assert "  ceiling 1,234,567   numbers same" in narrow


def test_a_record_is_called_by_its_column_where_that_has_numbers() -> None:
    (first, _) = records_of(
        Table(("seq", "steps"), "rr", (("16", "1"), ("32", "2")), frozenset({1})), 60
    )
    assert first.title == "seq 16" and first.lines == ("steps 1",) and not first.is_total


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
