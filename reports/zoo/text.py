"""Results as Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from autobatch.support.units import GIB
from reports.common.markdown import table

Facts = Mapping[str, Any]

_COMPARED = ("activations", "upper bound", "slope")
_LONGEST = 260
_HEADS = (
    "workload",
    "packages",
    "plan",
    "ceiling",
    "allocated",
    "executions",
    "seconds",
    "activations against the CPU",
    "verdict",
)


def result(facts: Facts) -> str:
    """Render everything that is known of a run."""
    parts = [_heading(facts)]
    areas = dict.fromkeys(row["area"] for row in facts["rows"])
    for area in areas:
        rows = [row for row in facts["rows"] if row["area"] == area]
        tried = [row for row in rows if row["outcome"] == "planned"]
        if tried:
            title = area.replace("_", " ").capitalize()
            parts.append(f"### {title}\n\n{table(_HEADS, map(_row, tried))}")
    parts += [_reasons(facts), _warnings(facts), _uncompared(facts)]
    return "\n\n".join(part for part in parts if part)


def _heading(facts: Facts) -> str:
    found = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    share = 100 * facts["right"] / max(facts["workloads"], 1)
    return (
        f"{facts['date']}; {found}. {facts['gpu']} unless said otherwise, simulated.\n\n"
        f"**{facts['right']} of {facts['workloads']} workloads ({share:.0f} %) get a right plan**, "
        f"from {facts['packages']} packages; {facts['planned']} get a plan at all. Of "
        f"{facts['activations_compared']} whose activations were compared with a run on the CPU, "
        f"{facts['activations_agree']} agree within 1 % at every size."
    )


def _row(row: Facts) -> list[str]:
    gpu = "" if row["gpu"] == "a100-40gb" else f" on {row['gpu']}"
    quadratic = ", quadratic" if "quadratic" in row["method"] else ""
    bisected = ", by bisection" if row["method"] == "bisection" else ""
    return [
        f"`{row['key']}`: {row['what']}",
        _packages(row),
        f"{row['micro_batch']:,}×{row['accumulation_steps']:,}{gpu}",
        "" if row["ceiling"] is None else f"{row['ceiling']:,}",
        f"{row['allocated_bytes'] / GIB:.1f} GiB",
        f"{row['executions']}{quadratic}{bisected}",
        f"{row['seconds']:.1f}",
        _difference(row),
        f"**{row['verdict']}**" if row["verdict"] != "right" else "right",
    ]


def _packages(row: Facts) -> str:
    return ", ".join(f"{name} {version or ''}".strip() for name, version in row["packages"].items())


def _difference(row: Facts) -> str:
    """Return the largest difference of the activations, in percent of the CPU's."""
    compared = [c for c in row.get("checks", ()) if c["check"] in _COMPARED]
    if not compared:
        return ""
    worst = max(
        (100 * (c["found"] - c["expected"]) / max(c["expected"], 1) for c in compared), key=abs
    )
    return "equal" if worst == 0 else f"{worst:+.2f} %"


def _reasons(facts: Facts) -> str:
    """Render what is not right, with the reason."""
    rows = [row for row in facts["rows"] if row.get("verdict") != "right"]
    if not rows:
        return ""
    cells = [
        [
            f"`{row['key']}`",
            _packages(row),
            row.get("verdict", row["outcome"]),
            _cell(row["reason"]),
        ]
        for row in rows
    ]
    return f"### Not right\n\n{table(['workload', 'packages', '', 'reason'], cells)}"


def _warnings(facts: Facts) -> str:
    """Render the warnings of plans, each with the workloads that have it."""
    told: dict[str, list[str]] = {}
    for row in facts["rows"]:
        for warning in row.get("warnings", ()):
            told.setdefault(warning, []).append(f"`{row['key']}`")
    if not told:
        return ""
    cells = [[_cell(text), ", ".join(names)] for text, names in told.items()]
    return f"### Warnings\n\n{table(['warning', 'workloads'], cells)}"


def _uncompared(facts: Facts) -> str:
    """Render why plans were not compared with the CPU."""
    rows = [row for row in facts["rows"] if "not_on_cpu" in row]
    if not rows:
        return ""
    cells = [[f"`{row['key']}`", _cell(row["not_on_cpu"])] for row in rows]
    return f"### Not compared with the CPU\n\n{table(['workload', 'reason'], cells)}"


def _cell(text: str) -> str:
    """Make a line fit into a cell of a table."""
    text = " ".join(text.split())
    short = text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"
    return short.replace("|", "\\|").replace("<", "&lt;")
