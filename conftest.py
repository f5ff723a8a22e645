"""Doctests are looked for in all modules but those that import a library that is not installed."""

import ast
from importlib.util import find_spec
from pathlib import Path

_ROOT = Path(__file__).parent


def _imported(module: Path) -> set[str]:
    """The top-level packages that a module imports as it is imported itself."""
    names = set()
    for statement in ast.parse(module.read_text()).body:
        if isinstance(statement, ast.Import):
            names |= {alias.name for alias in statement.names}
        elif isinstance(statement, ast.ImportFrom) and statement.module and not statement.level:
            names.add(statement.module)
    return {name.partition(".")[0] for name in names}


collect_ignore = [
    str(module.relative_to(_ROOT))
    for module in sorted((_ROOT / "autobatch").rglob("*.py"))
    if any(find_spec(name) is None for name in _imported(module))
]
