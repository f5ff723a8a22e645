"""The tables and charts of README.md, from the JSON files beside it.

Invariant: every figure comes from a file; what a file does not hold is shown as "–".
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from autobatch.support.units import format_bytes
from reports.common.markdown import renew_section, table
from reports.hardware.chart import draw
from reports.hardware.facts import (
    Facts,
    at_ceiling,
    error_at_ceiling,
    get,
    virtual_error,
    virtual_errors,
)

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
UNKNOWN = "–"
GOAL_ERROR, GOAL_EXECUTIONS = 0.005, 3

NOTHING = """\
**Nothing has been measured yet.** There is no JSON file in this folder, because no GPU was at hand
when this was written. Unmeasured are therefore, on every card:

- whether ceilings are exact, how many executions they take, and whether they take an OOM;
- how far the trace model's extrapolated peaks are from the measured ones, allocated and reserved;
- how far the virtual GPU's peaks and ceilings are from those of the real card, for every workload;
- which allocations only the real card makes, such as the workspaces of convolutions;
- the CUDA context, and what NVML shows beyond it and the reserved bytes;
- what recording PyTorch's memory history costs a training window;
- what accelerate's and Lightning's batch-size finders need for the same windows.

Every test of the package runs on CPUs; there a card is simulated, or played by
`tests/support/cuda_on_cpu.py`; `tests/reports/test_hardware.py` rehearses this command with it."""


def render(folder: Path) -> None:
    """Write the section between the markers of FOLDER/README.md, and the charts beside it."""
    documents = load(folder)
    renew_section(folder / "README.md", BEGIN, END, f"\n{section(documents)}\n")
    for stem, document in documents.items():
        draw(document, folder / f"{stem}.svg")


def load(folder: Path) -> dict[str, Facts]:
    """Return the documents of workloads in a folder, by file stem."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    return {stem: document for stem, document in found.items() if "workloads" in document}


def section(documents: dict[str, Facts]) -> str:
    """Return what belongs between the markers."""
    if not documents:
        return NOTHING
    return "\n\n".join(_device(stem, document) for stem, document in documents.items())


def _device(stem: str, document: Facts) -> str:
    device, versions = document["device"], document["versions"]
    major, minor = device["compute_capability"]
    rows = [row for row in document["workloads"] if row["measure"]]
    parts = [
        f"### {device['name']}, torch {device['torch']}",
        f"`{document['command']}`, {document['date'][:10]}, {document['seconds']:.0f} s in all: "
        f"{format_bytes(device['capacity_bytes'])}, compute capability {major}.{minor}, driver "
        f"{device['driver']}, CUDA {device['cuda']}, cuDNN {device['cudnn']}, Python "
        f"{device['python']}, autobatch {versions['autobatch']}. Figures are in `{stem}.json`.",
        "\n".join(f"- {line}" for line in _goals(rows)),
        _titled("Ceilings", _CEILINGS, rows),
        _titled("Extrapolated and replayed peaks at the ceiling", _EXTRAPOLATION, rows),
        f"![Errors of predicted peaks]({stem}.svg)",
        _titled("The virtual GPU beside the real one", _VIRTUAL, rows),
        _alignments(rows),
        _ops(rows),
        _titled("What the driver sees", _DRIVER, rows),
        _recording(rows),
        _rivals(rows),
        _missing(document),
    ]
    return "\n\n".join(part for part in parts if part)


def _goals(rows: Sequence[Facts]) -> Iterator[str]:
    searched = [row for row in rows if get(row, "measure", "ceiling")]
    proven = [row for row in searched if get(row, "measure", "proof") is not None]
    exact = [row for row in proven if _is_exact(row)]
    yield f"ceilings exact (n confirmed, n + 1 refuted): {len(exact)} of {len(proven)} proven ones"
    few = [r for r in searched if get(r, "measure", "ceiling", "executions") <= GOAL_EXECUTIONS]
    yield f"at most {GOAL_EXECUTIONS} executions to the ceiling: {len(few)} of {len(searched)}"
    calm = [row for row in searched if not get(row, "measure", "ceiling", "ooms")]
    yield f"no OOM on the way: {len(calm)} of {len(searched)}"
    errors = {row["name"]: _extrapolation_errors(row) for row in rows}
    known = {name: error for name, error in errors.items() if error}
    within = [e for e in known.values() if max(map(abs, e)) <= GOAL_ERROR]
    yield (
        f"extrapolated peaks at the ceiling within {GOAL_ERROR:.1%}, allocated and reserved: "
        f"{len(within)} of {len(known)} aligned workloads"
    )
    labelled = [get(row, "measure", "labelled") for row in rows]
    same = [all(trace["same_as_unlabelled"] for trace in traces) for traces in labelled if traces]
    yield f"labelled traces equal to those of plain runs: {sum(same)} of {len(same)} workloads"
    virtual = [error for row in rows for error in virtual_errors(row, "allocated_bytes")]
    if virtual:
        yield f"largest error of the virtual GPU's allocated peaks: {max(map(abs, virtual)):.2%}"


def _is_exact(row: Facts) -> bool:
    confirmed = get(row, "measure", "ceiling", "confirmed")
    return bool(confirmed) and not get(row, "measure", "proof", "fits")


def _extrapolation_errors(row: Facts) -> list[float]:
    errors = [
        error_at_ceiling(row, "foretold", what) for what in ("allocated_bytes", "reserved_bytes")
    ]
    return [error for error in errors if error is not None]


def _share(error: float | None) -> str:
    return UNKNOWN if error is None else f"{error:+.2%}"


def _bytes(size: int | None) -> str:
    return UNKNOWN if size is None else format_bytes(size)


def _plain(value: Any) -> str:
    return UNKNOWN if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def _seconds(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.1f}"


def _proof(row: Facts) -> str:
    proof = get(row, "measure", "proof")
    if proof is None:
        return UNKNOWN
    if not proof["fits"]:
        return "refuted: OOM" if proof["oom"] else "refuted: over budget or a retry"
    return f"FITS: {proof.get('ceiling_after_all', UNKNOWN)} after all"


def _how(row: Facts) -> str:
    reason = get(row, "measure", "ceiling", "reason")
    name = _plain(get(row, "measure", "ceiling", "method"))
    return f"{name}: {reason}".replace("|", "/") if reason else name


def _limit(row: Facts) -> str:
    limit = get(row, "measure", "limit_bytes")
    return "none" if limit is None else format_bytes(limit)


Column = tuple[str, Callable[[Facts], str]]


def _of(*names: str, shown: Callable[[Any], str] = _plain) -> Callable[[Facts], str]:
    return lambda row: shown(get(row, *names))


_NAME: Column = ("workload", lambda row: str(row["name"]))

_CEILINGS: tuple[Column, ...] = (
    _NAME,
    ("limit", _limit),
    ("ceiling n", _of("measure", "ceiling", "micro_batch")),
    ("n + 1", _proof),
    ("executions", _of("measure", "ceiling", "executions")),
    ("OOMs", _of("measure", "ceiling", "ooms")),
    ("retries", _of("measure", "ceiling", "alloc_retries")),
    ("seconds", _of("measure", "ceiling", "seconds", shown=_seconds)),
    ("method", _how),
)


def _off(source: str, what: str) -> Callable[[Facts], str]:
    return lambda row: _share(error_at_ceiling(row, source, what))


_EXTRAPOLATION: tuple[Column, ...] = (
    _NAME,
    ("allocated", lambda row: _bytes(get(at_ceiling(row), "measured", "allocated_bytes"))),
    ("reserved", lambda row: _bytes(get(at_ceiling(row), "measured", "reserved_bytes"))),
    ("foretold from 2 and 3, allocated", _off("foretold", "allocated_bytes")),
    ("reserved", _off("foretold", "reserved_bytes")),
    ("refitted, allocated", _off("refitted", "allocated_bytes")),
    ("reserved", _off("refitted", "reserved_bytes")),
    ("replayed, allocated", _off("replayed", "allocated_bytes")),
    ("reserved", _off("replayed", "reserved_bytes")),
    ("aligned", lambda row: _aligned(row)),
)


def _aligned(row: Facts) -> str:
    found = get(row, "measure", "extrapolation")
    if found is None:
        return UNKNOWN
    return "yes" if found["aligned"] else f"no: {found['reason']}".replace("|", "/")


def _largest(what: str) -> Callable[[Facts], str]:
    return lambda row: _share(max(virtual_errors(row, what), key=abs, default=None))


def _last(what: str) -> Callable[[Facts], str]:
    return lambda row: _share(virtual_error(row, what))


_VIRTUAL: tuple[Column, ...] = (
    _NAME,
    ("ceiling measured", _of("measure", "ceiling", "micro_batch")),
    ("virtual", _of("virtual", "ceiling", "micro_batch")),
    ("allocated at the largest size", _last("allocated_bytes")),
    ("reserved", _last("reserved_bytes")),
    ("allocated, largest error of all sizes", _largest("allocated_bytes")),
    ("reserved", _largest("reserved_bytes")),
    ("executions", _of("virtual", "ceiling", "executions")),
    ("seconds", _of("virtual", "ceiling", "seconds", shown=_seconds)),
)

_ALIGNMENT: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("micro-batch", "micro_batch", _plain),
    ("matched", "matched", _plain),
    ("only real", "only_real", _plain),
    ("of these scratch", "only_real_scratch", _plain),
    ("at its peak", "only_real_bytes_at_peak", _bytes),
    ("only virtual", "only_virtual", _plain),
    ("at its peak", "only_virtual_bytes_at_peak", _bytes),
    ("matched, freed in another phase", "freed_elsewhere", _plain),
)


def _alignments(rows: Sequence[Facts]) -> str:
    body = [
        [row["name"], *(show(aligned[key]) for _, key, show in _ALIGNMENT)]
        for row in rows
        for aligned in get(row, "virtual", "alignments") or []
    ]
    head = ["workload", *(head for head, _, _ in _ALIGNMENT)]
    return "#### Allocations that only one of them has\n\n" + table(head, body)


def _seen(row: Facts) -> list[tuple[int, int]]:
    """Return what NVML saw this process take, and what was reserved, for each trial."""
    before = get(row, "measure", "nvml_before_bytes")
    trials = get(row, "measure", "trials") or []
    if before is None:
        return []
    return [
        (trial["nvml_used_bytes"] - before, trial["peak_reserved_bytes"])
        for trial in trials
        if trial["nvml_used_bytes"] is not None
    ]


_DRIVER: tuple[Column, ...] = (
    _NAME,
    ("largest reserved peak", lambda row: _bytes(max((r for _, r in _seen(row)), default=None))),
    ("NVML peak", lambda row: _bytes(max((seen for seen, _ in _seen(row)), default=None))),
    ("NVML beyond reserved", lambda row: _bytes(max((s - r for s, r in _seen(row)), default=None))),
    ("context by autobatch", _of("measure", "context_bytes", shown=_bytes)),
    ("others by autobatch", _of("measure", "others_bytes", shown=_bytes)),
    ("context in the catalogue", _of("virtual", "assumed_context_bytes", shown=_bytes)),
)


def _titled(title: str, columns: Sequence[Column], rows: Sequence[Facts]) -> str:
    body = [[show(row) for _, show in columns] for row in rows]
    return f"#### {title}\n\n{table([head for head, _ in columns], body)}"


def _ops(rows: Sequence[Facts]) -> str:
    """List the ops of unmatched allocations, all workloads together, largest first."""
    lists = []
    for side, title in (("only_real_ops", "only real"), ("only_virtual_ops", "only virtual")):
        found = [
            (op["bytes"], row["name"], op)
            for row in rows
            for aligned in (get(row, "virtual", "alignments") or [])[-1:]
            for op in aligned[side]
        ]
        lists += [
            [title, name, op["op"], op["phase"], _plain(op["count"]), _bytes(size)]
            for size, name, op in sorted(found, key=lambda item: -item[0])[:15]
        ]
    if not lists:
        return ""
    return (
        "#### Ops of the allocations without a partner, the 15 largest of either side\n\n"
        + table(("side", "workload", "op", "phase", "allocations", "bytes in two windows"), lists)
    )


def _recording(rows: Sequence[Facts]) -> str:
    body = []
    for row in rows:
        cost = get(row, "measure", "recording")
        if cost:
            off, on = cost["window_seconds_off"], cost["window_seconds_on"]
            size = str(cost["micro_batch"])
            body.append([row["name"], size, f"{off:.4f}", f"{on:.4f}", _share(on / off - 1)])
    if not body:
        return ""
    heads = ("workload", "micro-batch", "seconds without", "seconds with", "difference")
    return f"#### A window with PyTorch's memory history\n\n{table(heads, body)}"


def _rivals(rows: Sequence[Facts]) -> str:
    body = []
    for row in rows:
        finders = get(row, "rivals", "finders")
        if not finders:
            continue
        ours = row["measure"]["ceiling"]
        body.append(
            [row["name"], "autobatch", str(ours["micro_batch"]), str(ours["executions"]),
             str(ours["ooms"]), _seconds(ours["seconds"]), ""]
        )  # fmt: skip
        for finder in finders:
            if finder["version"] is None:
                body.append([row["name"], finder["finder"], *[UNKNOWN] * 4, "not installed"])
                continue
            name = f"{finder['finder']} {finder['version']}"
            body.append(
                [row["name"], name, _plain(finder["found"]), str(finder["executions"]),
                 str(finder["ooms"]), _seconds(finder["seconds"]), finder["ending"] or ""]
            )  # fmt: skip
    if not body:
        return ""
    heads = ("workload", "finder", "found", "sizes tried", "OOMs", "seconds", "")
    return f"#### Other finders, the same windows\n\n{table(heads, body)}"


def _missing(document: Facts) -> str:
    lines = [f"- not run, as the time was up: {job}" for job in document["not_run"]]
    for row in document["workloads"]:
        for kind in ("measure", "virtual", "rivals"):
            lines += [
                f"- {kind} of {row['name']}, {error['stage']}: {error['error']}"
                for error in (row[kind] or {}).get("errors", [])
            ]
    return "#### What is missing\n\n" + "\n".join(lines) if lines else ""
