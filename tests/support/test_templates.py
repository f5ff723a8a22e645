"""How `autobatch.support.templates` renders, shown with templates of a few lines."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from jinja2 import UndefinedError

from autobatch.support.templates import render
from tests.support import ROOT


@pytest.mark.parametrize(
    ("name", "rendered"), [("a.html.jinja", "&lt;b&gt;&amp;"), ("a.py.jinja", "<b>&")]
)
def test_all_but_python_is_escaped(tmp_path: Path, name: str, rendered: str) -> None:
    (tmp_path / name).write_text("{{ text }}")
    assert render(tmp_path, name, text="<b>&") == rendered


def test_a_line_of_tags_leaves_no_line(tmp_path: Path) -> None:
    (tmp_path / "a.py.jinja").write_text("one\n    {% if yes %}\n  two\n    {% endif %}\nthree\n")
    assert render(tmp_path, "a.py.jinja", yes=True) == "one\n  two\nthree\n"
    assert render(tmp_path, "a.py.jinja", yes=False) == "one\nthree\n"


def test_a_missing_value_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.html.jinja").write_text("{{ titel }}")
    with pytest.raises(UndefinedError, match="titel"):
        render(tmp_path, "a.html.jinja", title="")


def test_importing_the_package_or_what_renders_loads_no_jinja2() -> None:
    code = (
        "import sys, autobatch, autobatch.advice.loop, autobatch.report.html;"
        "sys.exit('jinja2' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
