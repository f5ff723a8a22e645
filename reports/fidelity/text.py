"""Results as Markdown."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from autobatch.support.files import write_text
from autobatch.support.units import format_bytes
from reports.common.journal import Record
from reports.common.markdown import table
from reports.common.results import today, versions
from reports.fidelity.results import RESULTS, errors, is_near, kinds, reads_values, summarise, worst

Facts = Mapping[str, Any]

_MOST_KINDS = 20
_LONGEST = 160


def result(facts: Facts) -> str:
    """Render everything that is known of a run."""
    records = facts["records"]
    compared = [record for record in records if record["outcome"] == "compared"]
    parts = [
        _heading(facts),
        table(_HEADS, _groups(compared)) if compared else "",
        _far(compared),
        _kinds(facts["kinds"]),
        _failed(records),
    ]
    return "\n\n".join(part for part in parts if part)


def write_results(records: Iterable[Record], out: Path) -> str:
    """Write the results of a run into its folder, and return them as Markdown."""
    rows = sorted(records, key=lambda record: record["key"])
    facts = {
        "evidence": "PyTorch's CUDA code on a simulated runtime",
        "command": "python -m reports.fidelity",
        "date": today(),
        "versions": versions("torch", "timm", "transformers", "torchvision"),
        **summarise(rows),
        "kinds": kinds(rows),
        "records": rows,
    }
    write_text(out / RESULTS, json.dumps(facts, indent=1) + "\n")
    return result(facts)


_HEADS = ("", "rows", "models", "within 0.05 %", "the same bytes", "every allocation", "worst")


def _heading(facts: Facts) -> str:
    names = ("torch", "timm", "transformers", "torchvision")
    versions = ", ".join(
        f"{name} {facts['versions'][name]}" for name in names if facts["versions"].get(name)
    )
    share = facts["near"] / max(facts["compared"], 1)
    lines = [
        f"{facts['compared']} rows of {facts['models']} models "
        f"({facts['evidence']}; {versions}; {facts['date']}; `{facts['command']}`): "
        f"**{facts['near']} ({share:.1%}) have allocated and reserved peaks within 0.05 %**, "
        f"{facts['byte_for_byte']} are equal to the byte, and in {facts['every_allocation']} every "
        "allocation of every window has its counterpart."
    ]
    if facts["compared"]:
        quantiles = ", ".join(
            f"{float(value):.3%} at the {name}th percentile"
            for name, value in facts["percentiles"].items()
        )
        lines.append(f"Larger of the two errors: {quantiles}; worst {facts['worst']:.2%}.")
        if facts["worst_without_values"] != facts["worst"]:
            lines.append(
                f"Worst of the rows whose loop reads no value: {facts['worst_without_values']:.2%}."
            )
    lines.append(
        f"{facts['skipped']} rows have no model here, and {facts['failed']} failed on either side."
    )
    return "\n".join(lines)


def _groups(compared: Sequence[Record]) -> list[list[str]]:
    """Return a table row for each library, card, micro-batch, precision and with or without."""
    found: list[list[str]] = []
    for name, value_of in (
        ("library", lambda r: r["model"].partition(":")[0]),
        ("card", lambda r: r["gpu"]),
        ("micro-batch", lambda r: str(r["micro_batch"])),
        ("precision", lambda r: r["precision"]),
        ("checkpointing", lambda r: "checkpointed" if r["checkpointing"] else "not checkpointed"),
    ):
        for value in dict.fromkeys(map(value_of, compared)):
            rows = [record for record in compared if value_of(record) == value]
            label = f"{name} {value}" if name == "micro-batch" else value
            found.append([label, *_counts(rows)])
    return [*found, ["all", *_counts(compared)]]


def _counts(rows: Sequence[Record]) -> list[str]:
    near = sum(map(is_near, rows))
    alike = [
        not row["difference"]["only_bench"] and not row["difference"]["only_predicted"]
        for row in rows
    ]
    equal = sum(row["bench_bytes"] == row["predicted_bytes"] for row in rows)
    return [
        str(len(rows)),
        str(len({row["model"] for row in rows})),
        f"{near} ({near / len(rows):.1%})",
        str(equal),
        str(sum(alike)),
        f"{max(map(worst, rows)):.2%}",
    ]


def _far(compared: Sequence[Record]) -> str:
    far = sorted((row for row in compared if not is_near(row)), key=worst, reverse=True)
    if not far:
        return ""
    errors_of = ("bench, reserved", "allocated", "reserved")
    heads = ("row", *errors_of, "first difference", "most at peak", "reads")
    rows = []
    for record in far:
        allocated, reserved = errors(record)
        kinds = record["difference"]["kinds"]
        rows.append(
            [
                record["key"],
                format_bytes(record["bench_bytes"][1]),
                f"{allocated:+.3%}",
                f"{reserved:+.3%}",
                record["difference"]["first"] or "",
                _kind(kinds[0]) if kinds else "order of frees",
                ", ".join(f"{op} {n}x" for op, n in record.get("values_read", {}).items()),
            ]
        )
    text = f"Rows beyond 0.05 %, with what differs:\n\n{table(heads, rows)}"
    if any(map(reads_values, far)):
        text += (
            "\n\n*reads*: values of tensors that the loop asked for in all windows, such as "
            "whether a mask is all true. Kernels of the bench do nothing, so what hangs on "
            "them there is not what a card allocates."
        )
    return text


def _kind(kind: Mapping[str, Any]) -> str:
    return (
        f"{kind['side']} only: {kind['op'] or 'no op'} in {kind['phase']}, "
        f"{kind['count']} x {kind['size_bytes']:,} B, {kind['at_peak']} at the peak"
    )


def _kinds(kinds: Sequence[Mapping[str, Any]]) -> str:
    if not kinds:
        return ""
    heads = ("only in", "op", "phase", "rows", "largest", "bytes at peaks")
    rows = [
        [
            kind["side"],
            f"`{kind['op']}`" if kind["op"] else "none",
            kind["phase"],
            str(kind["rows"]),
            f"{kind['largest_bytes']:,} B",
            f"{kind['bytes_at_peak']:,}",
        ]
        for kind in kinds[:_MOST_KINDS]
    ]
    return f"Kinds of differences, those in most rows first:\n\n{table(heads, rows)}"


def _failed(records: Sequence[Record]) -> str:
    rows = [
        [record["key"], "; ".join(f"{k}: {v}" for k, v in record["reasons"].items())[:_LONGEST]]
        for record in records
        if record["outcome"] == "failed"
    ]
    return f"Rows that failed:\n\n{table(('row', 'why'), rows)}" if rows else ""
