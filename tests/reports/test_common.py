"""What reports share: journals, tables and sections of a README."""

from operator import itemgetter

import pytest

from reports.common.command_line import output_folder
from reports.common.journal import append, read_journal
from reports.common.markdown import renew_section, table
from reports.common.results import csv_text, one_line, versions


def test_a_table_has_a_rule_below_its_heads():
    assert table(("a", "b"), [("1", "2")]) == "| a | b |\n|-|-|\n| 1 | 2 |"


def test_a_section_is_renewed_and_the_rest_of_the_file_stays(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("# Title\n<a>\nold\n</a>\nThe end.\n")
    for _ in range(2):
        renew_section(readme, "<a>", "</a>", "\nnew\n")
    assert readme.read_text() == "# Title\n<a>\nnew\n</a>\nThe end.\n"


def test_a_journal_that_ends_in_half_a_line_can_be_read_and_goes_on(tmp_path):
    journal = tmp_path / "rows.jsonl"
    assert read_journal(journal) == {}
    append(journal, {"key": "a", "size": 1})
    with journal.open("a") as stream:
        stream.write('{"key": "ha')
    append(journal, {"key": "b", "size": 2})
    append(journal, {"key": "a", "size": 3})
    assert {key: record["size"] for key, record in read_journal(journal).items()} == {
        "a": 3,
        "b": 2,
    }
    assert set(read_journal(journal, key=itemgetter("key", "size"))) == {
        ("a", 1), ("b", 2), ("a", 3),
    }  # fmt: skip


def test_a_column_that_is_not_asked_for_is_left_out_of_the_csv():
    assert csv_text(["a"], [{"a": "x, y", "b": 2}]) == 'a\n"x, y"\n'


@pytest.mark.parametrize(
    ("error", "line"),
    [(ValueError("no\nluck"), "ValueError: no"), (KeyError(), "KeyError:")],
)
def test_an_error_is_told_in_one_line(error, line):
    assert one_line(error) == line


def test_what_is_not_installed_has_no_version():
    found = versions("torch", "a-package-that-is-not-there")
    assert found["torch"] and found["a-package-that-is-not-there"] is None


def test_only_a_new_folder_is_kept_out_of_version_control(tmp_path):
    assert not (output_folder(tmp_path) / ".gitignore").exists()
    assert (output_folder(tmp_path / "new" / "run") / ".gitignore").read_text() == "*\n"
