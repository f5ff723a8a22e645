"""Documents as HTML: a page that opens from disk, and a fragment for notebooks.

Invariant: both are self-contained (no scripts, no network), and every string is escaped.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from html import escape

from autobatch.records.plan_record import PlanRecord
from autobatch.report.content import summary
from autobatch.report.document import (
    Bullets,
    Chart,
    Code,
    ContentBlock,
    Document,
    Facts,
    Paragraph,
    Section,
    Table,
)

__all__ = ["notebook", "page"]

_STYLE = """
:root { color-scheme: light; }
body { margin: 0; background: #f5f6f8; color: #1d2430;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
header, section { background: #fff; border: 1px solid #e1e5ea; border-radius: 10px;
  padding: 1.25rem 1.5rem; margin-bottom: 1rem; }
header { background: #1f2a44; border-color: #1f2a44; color: #fff; }
header p { margin: 0; color: #c8d2e8; }
h1 { font-size: 1.5rem; line-height: 1.3; margin: 0 0 .25rem; }
h2 { font-size: 1.1rem; margin: 0 0 .75rem; }
p, ul, table, pre, figure, dl { margin: 0 0 1rem; }
section > :last-child { margin-bottom: 0; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .3rem 1.25rem; }
dt { color: #5b6678; } dd { margin: 0; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; }
th, td { padding: .3rem .8rem; border-bottom: 1px solid #e7eaef; text-align: left;
  vertical-align: top; }
th { color: #5b6678; font-weight: 600; white-space: nowrap; }
.r { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
tr.total td { font-weight: 600; background: #f5f6f8; }
pre { background: #f5f6f8; border: 1px solid #e7eaef; border-radius: 8px; padding: 1rem;
  overflow-x: auto; font-size: .86rem; line-height: 1.45; }
code { background: #eef1f5; border-radius: 4px; padding: .05rem .3rem; }
pre code { background: none; padding: 0; }
figure svg { width: 100%; height: auto; display: block; }
figcaption { color: #5b6678; font-size: .9rem; }
section.warnings { border-left: 4px solid #d98e04; background: #fffaf0; }
@media print { body { background: #fff; } section { break-inside: avoid; } }
"""


def page(document: Document, drawings: Mapping[str, str]) -> str:
    """Return a whole HTML page; `drawings` holds the SVG of each chart by name."""
    body = "\n".join(_section(section, drawings) for section in document.sections)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(document.title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
<header><h1>{escape(document.title)}</h1><p>{escape(document.subtitle)}</p></header>
{body}
</main>
</body>
</html>
"""


def notebook(plan: PlanRecord) -> str:
    """Return the plan's summary as a small HTML fragment, styled by the notebook itself."""
    document = summary(plan)
    body = "\n".join(_section(section, {}) for section in document.sections)
    return (
        f"<div><h3>{escape(document.title)}</h3><p>{escape(document.subtitle)}</p>\n{body}\n</div>"
    )


def _section(section: Section, drawings: Mapping[str, str]) -> str:
    kind = ' class="warnings"' if section.title == "Warnings" else ""
    heading = f"<h2>{escape(section.title)}</h2>\n" if section.title else ""
    body = "\n".join(_block(block, drawings) for block in section.blocks)
    return f"<section{kind}>\n{heading}{body}\n</section>"


def _block(block: ContentBlock, drawings: Mapping[str, str]) -> str:
    match block:
        case Paragraph(text):
            return f"<p>{_prose(text)}</p>"
        case Bullets(items):
            return "<ul>" + "".join(f"<li>{_prose(item)}</li>" for item in items) + "</ul>"
        case Facts(pairs):
            rows = (f"<dt>{escape(name)}</dt><dd>{_prose(text)}</dd>" for name, text in pairs)
            return "<dl>" + "".join(rows) + "</dl>"
        case Table():
            return _table(block)
        case Code(text):
            return f"<pre><code>{escape(text)}</code></pre>"
        case Chart(name, caption):
            return f"<figure>{drawings[name]}<figcaption>{escape(caption)}</figcaption></figure>"


def _table(table: Table) -> str:
    head = _row("th", table.columns, table.align, "")
    rows = "".join(
        _row("td", row, table.align, ' class="total"' if index in table.totals else "")
        for index, row in enumerate(table.rows)
    )
    return f'<div class="scroll"><table><thead>{head}</thead><tbody>\n{rows}</tbody></table></div>'


def _row(tag: str, cells: tuple[str, ...], align: str, attributes: str) -> str:
    return (
        f"<tr{attributes}>"
        + "".join(
            f'<{tag} class="{side}">{escape(cell)}</{tag}>'
            for cell, side in zip(cells, align, strict=True)
        )
        + "</tr>\n"
    )


def _prose(text: str) -> str:
    """Escape running text, then mark up its `code` and https links."""
    safe = escape(text)
    safe = re.sub(r"`([^`]+)`", r"<code>\1</code>", safe)
    return re.sub(r"(https://[\w./-]*\w)", r'<a href="\1">\1</a>', safe)
