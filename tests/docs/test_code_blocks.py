"""Every code block of README and docs runs, as a reader would run it.

Blocks of README stand alone. Those of a page of the docs run one after the other in one process, in
which the names that the page's text takes for known are there (`settings/`).
"""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.bench.children import needs_bench
from tests.docs.blocks import PAGES, Block, blocks_of
from tests.support import ROOT

README = ROOT / "README.md"
SETTINGS = Path(__file__).parent / "settings"

pytestmark = pytest.mark.slow

_SECONDS = 400
_INSTALLS = re.compile(r"(make|pip|\.venv/bin/pip|git) ")
"""Commands that would install what the tests run in."""

_LIBRARIES = {
    "hf": "transformers",
    "timm": "timm",
    "torchvision": "torchvision",
    "sweep": "optuna",
    "check": "torch",
}
"""What a SPEC or a verb of the command line needs."""


def run(command: list[str], folder: Path) -> str:
    """Run a command as a user with the package installed would; return what it printed."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    variables = {
        **os.environ,
        "PYTHONPATH": path,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        "COLUMNS": "100",
        "PYTHONUTF8": "1",
    }
    done = subprocess.run(
        command, cwd=folder, env=variables, capture_output=True, text=True, timeout=_SECONDS
    )
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def require(block: Block) -> None:
    """Skip a block whose libraries are not installed."""
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        else:
            continue
        for name in names:
            library = name.partition(".")[0]
            library = _ASKED_BY.get(name, library)
            if find_spec(library) is None:
                pytest.skip(f"{library} is not installed")


_ASKED_BY = {
    "autobatch.integrations.transformers": "accelerate",
    "autobatch.integrations.lightning": "lightning",
}


def identified(block: Block) -> str:
    return str(block)


def _records(block: Block) -> bool:
    """Whether a block records memory, for which there has to be a GPU."""
    return "_record_memory_history" in block.text


@pytest.mark.parametrize(
    "block", [b for b in blocks_of(README, "python") if not _records(b)], ids=identified
)
def test_a_block_of_the_readme_runs_as_it_stands(block: Block, tmp_path: Path) -> None:
    require(block)
    script = tmp_path / "train.py"
    script.write_text(block.text, encoding="utf-8")
    if "init_process_group" in block.text:
        ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        run([sys.executable, *ranks, script.name], tmp_path)
    else:
        run([sys.executable, script.name], tmp_path)


@needs_bench
@pytest.mark.parametrize(
    "block",
    [block for page in PAGES for block in blocks_of(page, "python") if _records(block)],
    ids=identified,
)
def test_what_a_block_records_is_explained(block: Block, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(block.text, encoding="utf-8")
    bench = [sys.executable, "-m", "tests.bench", "-g", "a100-40gb"]
    run([*bench, sys.executable, script.name], tmp_path)
    assert "1.00 GiB" in run(["autobatch", "explain", "snapshot.pickle"], tmp_path)


@pytest.mark.parametrize(
    "page", [p for p in PAGES[1:] if blocks_of(p, "python")], ids=lambda p: p.stem
)
def test_the_blocks_of_a_page_run_one_after_the_other(page: Path, tmp_path: Path) -> None:
    setting = SETTINGS / f"{page.stem.replace('-', '_')}.py"
    before = setting.read_text(encoding="utf-8") if setting.exists() else ""
    needed = re.findall(r"^# needs: (\w+)", before, re.M)
    for library in needed:
        pytest.importorskip(library)
    script = tmp_path / "page.py"
    parts = [(SETTINGS / "common.py").read_text(encoding="utf-8"), before]
    parts += [
        f"# {block}\n{block.text}" for block in blocks_of(page, "python") if not _records(block)
    ]
    script.write_text("\n\n".join(parts), encoding="utf-8")
    command = [sys.executable, "-W", "ignore", script.name]
    run(command, tmp_path)


def commands() -> list[tuple[Block, list[str]]]:
    """Return the blocks of commands, each with its lines, but for those that install.

    Examples have tests of their own (`tests/test_examples.py`).
    """
    found = []
    for page in (page for page in PAGES if page.parent.name != "examples"):
        for block in blocks_of(page, "shell"):
            lines = [line for line in block.text.splitlines() if not _INSTALLS.match(line)]
            if lines and "snapshot.pickle" not in block.text:
                found.append((block, lines))
    return found


@pytest.mark.parametrize(
    ("block", "lines"), commands(), ids=lambda b: str(b) if isinstance(b, Block) else ""
)
def test_a_block_of_commands_runs(block: Block, lines: list[str], tmp_path: Path) -> None:
    for name, library in _LIBRARIES.items():
        if re.search(rf"\b{name}[: ]", block.text) and find_spec(library) is None:
            pytest.skip(f"{library} is not installed")
    for name in ("examples", "docs"):
        (tmp_path / name).symlink_to(ROOT / name)
    for line in lines:
        run(shlex.split(line, comments=True), tmp_path)


def test_the_readme_shows_what_the_command_prints(tmp_path: Path) -> None:
    text = README.read_text(encoding="utf-8")
    told = re.search(
        r"^`(autobatch probe [^`]+)`.*?torch ([\d.]+), transformers ([\d.]+)", text, re.M | re.S
    )
    assert told
    for name, version in (("torch", told[2]), ("transformers", told[3])):
        found = pytest.importorskip(name).__version__
        if not found.startswith(version):
            pytest.skip(f"README shows what {name} {version} gives, and this is {found}")
    printed = run([*shlex.split(told[1]), "--no-cache"], tmp_path).splitlines()
    (block,) = (b for b in blocks_of(README, "text") if "effective batch 256" in b.text)
    shown, end = block.text.splitlines()[:-2], block.text.splitlines()[-2:]
    assert printed[: len(shown)] == shown
    seconds = re.compile(r"[\d.]+ s$")
    assert seconds.sub("", printed[len(shown)]) == seconds.sub("", end[0])
    assert end[1] == "…"
