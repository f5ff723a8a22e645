"""Which modules are searched for doctests, and that compiled ones are those of the source.

Doctests are looked for in all modules but those that import a library that is not installed, and
those that are compiled.
"""

import ast
from importlib.util import find_spec
from pathlib import Path

import pytest

_ROOT = Path(__file__).parent
_LIBRARIES = sorted((_ROOT / "autobatch").rglob("*.so"))


def _imported(module: Path) -> set[str]:
    """The top-level packages that a module imports as it is imported itself."""
    names = set()
    for statement in ast.parse(module.read_text()).body:
        if isinstance(statement, ast.Import):
            names |= {alias.name for alias in statement.names}
        elif isinstance(statement, ast.ImportFrom) and statement.module and not statement.level:
            names.add(statement.module)
    return {name.partition(".")[0] for name in names}


_COMPILED = [library.with_suffix("").with_suffix(".py") for library in _LIBRARIES]

collect_ignore = [str(module.relative_to(_ROOT)) for module in _COMPILED] + [
    str(module.relative_to(_ROOT))
    for module in sorted((_ROOT / "autobatch").rglob("*.py"))
    if any(find_spec(name) is None for name in _imported(module))
]


def pytest_configure() -> None:
    """Refuse to test what was compiled from another source."""
    for library, module in zip(_LIBRARIES, _COMPILED, strict=True):
        for source in (module, module.with_suffix(".pxd")):
            if source.stat().st_mtime > library.stat().st_mtime:
                pytest.exit(
                    f"{source.relative_to(_ROOT)} is newer than what was compiled from it: run "
                    f"`pip install --editable .` again, or remove {library.relative_to(_ROOT)}",
                    returncode=2,
                )
