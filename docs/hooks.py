"""Makes the site from the same pages that the repository shows.

The first page is README, and links to files outside of this folder lead to the repository.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parents[1]
_LINK = re.compile(r"(\]\()(?!\w+:|#)([^)\s#]+)")


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Return the text of a page as the site shows it."""
    source = f"docs/{page.file.src_uri}"
    if page.file.src_uri == "index.md":
        source, markdown = "README.md", (_ROOT / "README.md").read_text(encoding="utf-8")

    def moved(found: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), found[2]))
        if target.startswith("docs/"):
            here = posixpath.dirname(page.file.src_uri)
            return found[1] + posixpath.relpath(target.removeprefix("docs/"), here or ".")
        kind = "tree" if (_ROOT / target).is_dir() else "blob"
        return f"{found[1]}{config.repo_url}/{kind}/main/{target}"

    return _LINK.sub(moved, markdown)
