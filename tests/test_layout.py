"""The floor plan: what may import what is in pyproject.toml, and the rest of it is here."""

from __future__ import annotations

import ast
import re
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

from tests.support import ROOT

PACKAGE = ROOT / "autobatch"
TUNE, KERNELS = "autobatch.tuning.tuner", "autobatch.devices.virtual.kernels."


@cache
def imports() -> dict[str, set[str]]:
    """Return the modules that each module imports, inside functions and for types as well."""
    files = {_name(path): path for path in PACKAGE.rglob("*.py")}
    return {name: set(_imported(path, files)) - {name} for name, path in files.items()}


def _name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def _imported(path: Path, files: dict[str, Path]) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} has a relative import"
            submodules = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [name if name in files else str(node.module) for name in submodules]
    return [name for name in found if name in files]


def longest_chain(start: str, end: str) -> list[str]:
    """Return the longest chain of imports from a module to one whose name begins with `end`."""

    @cache
    def below(name: str) -> tuple[str, ...]:
        chains = [below(each) for each in sorted(imports()[name])]
        reaching = [chain for chain in chains if chain]
        if reaching:
            return (name, *max(reaching, key=len))
        return (name,) if name.startswith(end) else ()

    return list(below(start))


def test_no_file_is_in_a_circle_of_imports() -> None:
    order = list(
        TopologicalSorter(imports()).static_order()
    )  # raises CycleError where there is one
    assert len(order) == len(imports()) > 100


def test_the_packages_own_folder_holds_at_most_six_files() -> None:
    assert len([path for path in PACKAGE.iterdir() if path.is_file()]) <= 6


def test_every_folder_says_what_lives_there_and_what_it_imports() -> None:
    folders = [path.parent for path in PACKAGE.rglob("__init__.py") if path.parent != PACKAGE]
    for folder in folders:
        words = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8")))
        assert words is not None and re.search(r"\bimports?\b", words), folder


def test_the_architecture_page_shows_the_longest_chain_from_tune_to_a_kernel_rule() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    chain = longest_chain(TUNE, KERNELS)
    assert " → ".join(name.removeprefix("autobatch.") for name in chain) in " ".join(page.split())


def test_every_path_that_the_architecture_page_names_is_there() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = re.findall(r"`([\w/]+/[\w./]*|[\w/]+\.py)`", page)
    assert len(named) > 20
    for path in named:
        assert (PACKAGE / path).exists() or (ROOT / path).exists(), path
