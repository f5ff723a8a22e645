"""A summary as Markdown."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from autobatch.support.units import MIB
from reports.common.markdown import table
from reports.coverage.models import NO_HEAD

Facts = Mapping[str, Any]

COVERAGE_TARGETS = {"timm": 0.99, "transformers": 0.95}
SECONDS_TARGETS = {"timm": 3.0}
LEAST_TYPES = 150
_LONGEST = 220

_ROWS: tuple[tuple[str, Callable[[str, Facts], str]], ...] = (
    ("listed", lambda _, facts: f"{facts['listed']:,}"),
    ("not tried", lambda _, facts: f"{facts['not_tried']:,}" if facts["not_tried"] else ""),
    ("not built", lambda _, facts: f"{facts['not_built']:,}"),
    ("built", lambda name, facts: _with_least(name, facts)),
    ("predicted", lambda _, facts: f"{facts['predicted']:,}"),
    ("failed", lambda _, facts: f"{facts['failed']:,}"),
    ("**coverage**", lambda name, facts: _coverage(name, facts)),
    (
        "with a training loss of their own",
        lambda _, facts: f"{facts['with_a_loss_of_their_own']:,}",
    ),
    ("with shapes at their upper bound, or other warnings", lambda _, f: f"{f['with_warnings']:,}"),
    ("seconds, median", lambda name, facts: _median_seconds(name, facts)),
    ("seconds, 90th percentile", lambda _, facts: _figure(facts["seconds"], "p90", ".1f")),
    ("seconds, largest", lambda _, facts: _largest(facts["seconds"], 1, "s")),
    ("CPU seconds, median", lambda _, facts: _figure(facts["cpu_seconds"], "median", ".1f")),
    ("peak resident memory, median", lambda _, f: _memory(f["peak_rss_bytes"], "median")),
    ("peak resident memory, 90th percentile", lambda _, f: _memory(f["peak_rss_bytes"], "p90")),
    ("peak resident memory, largest", lambda _, f: _largest(f["peak_rss_bytes"], MIB, "MiB")),
    ("models above 1 GiB", lambda _, facts: f"{facts['rss_above_target']:,} (target 0)"),
)


def result(facts: Facts) -> str:
    """Render everything that is known of a run."""
    return "\n\n".join(
        part
        for part in (_heading(facts), figures(facts), failures(facts), not_built(facts))
        if part
    )


def _heading(facts: Facts) -> str:
    versions = ", ".join(f"{name} {found}" for name, found in facts["versions"].items() if found)
    return (
        f"{facts['date']}; {versions}. {facts['gpu']}, {facts['optimizer']}, "
        f"{facts['precision']}, micro-batch {facts['micro_batch']}."
    )


def figures(facts: Facts) -> str:
    """Render the figures of each library beside their targets."""
    libraries = {name: found for name, found in facts["libraries"].items() if found["predicted"]}
    rows = [[label, *(row(name, f) for name, f in libraries.items())] for label, row in _ROWS]
    return table(["", *libraries], [row for row in rows if any(row[1:])])


def failures(facts: Facts) -> str:
    """Render what was built and not predicted, by cause."""
    by_cause = _grouped(facts["failures"])
    if not by_cause:
        return ""
    parts = [f"### Failures\n\n{len(facts['failures'])} models were built and not predicted."]
    for cause, lines in by_cause.items():
        rows = [[line["library"], f"`{line['name']}`", _cell(line["error"])] for line in lines]
        parts.append(f"{_sentence(cause)}: {len(lines)}.")
        parts.append(table(["library", "name", "error"], rows))
    return "\n\n".join(parts)


def not_built(facts: Facts) -> str:
    """Render what has no model here, by cause; not counted."""
    by_cause = _grouped(facts["not_built"])
    if not by_cause:
        return ""
    parts = [
        f"### Not built\n\n{len(facts['not_built'])} names have no model here, and do not count."
    ]
    for cause, lines in by_cause.items():
        parts.append(f"{_sentence(cause)}: {len(lines)}.")
        if cause == NO_HEAD:
            parts.append(", ".join(f"`{line['name']}`" for line in lines) + ".")
        else:
            rows = [[f"`{line['name']}`", _cell(line["error"])] for line in lines]
            parts.append(table(["name", "reason"], rows))
    return "\n\n".join(parts)


def _grouped(lines: Iterable[Facts]) -> dict[str, list[Facts]]:
    """Group by cause, the most frequent first."""
    groups: defaultdict[str, list[Facts]] = defaultdict(list)
    for line in lines:
        groups[line["cause"]].append(line)
    return dict(sorted(groups.items(), key=lambda item: -len(item[1])))


def _sentence(cause: str) -> str:
    return cause[:1].upper() + cause[1:]


def _with_least(name: str, facts: Facts) -> str:
    least = f" (target at least {LEAST_TYPES})" if name == "transformers" else ""
    return f"{facts['built']:,}{least}"


def _coverage(name: str, facts: Facts) -> str:
    if facts["coverage"] is None:
        return ""
    return f"**{100 * facts['coverage']:.1f} %** (target {100 * COVERAGE_TARGETS[name]:.0f} %)"


def _median_seconds(name: str, facts: Facts) -> str:
    text = _figure(facts["seconds"], "median", ".1f")
    return f"{text} (target {SECONDS_TARGETS[name]:g})" if name in SECONDS_TARGETS else text


def _figure(spread: Facts | None, which: str, digits: str) -> str:
    return "" if spread is None else f"{spread[which]:{digits}}"


def _memory(spread: Facts | None, which: str) -> str:
    return "" if spread is None else f"{spread[which] / MIB:,.0f} MiB"


def _largest(spread: Facts | None, unit: int, name: str) -> str:
    if spread is None:
        return ""
    value = f"{spread['largest'] / unit:,.{1 if unit == 1 else 0}f} {name}"
    return f"{value} (`{spread['largest_name']}`)"


def _cell(text: str) -> str:
    """Make a line fit into a cell of a table."""
    short = text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"
    return short.replace("|", "\\|").replace("<", "&lt;")
