"""Ceilings, and other libraries' finders, on PyTorch's CUDA code on a simulated runtime.

    python -m reports.search bench [--table ceilings|finders] [--match GLOB] [--render]

Each task is a process on a card of its own. Records are kept as they come in bench.jsonl, and a run
that was cut short goes on from there; then the tables in README.md are written anew.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from autobatch.support.units import format_bytes
from reports.common.journal import Record, append, read_journal
from reports.common.markdown import renew_section, table
from reports.common.results import today, versions
from reports.search.finders import FINDERS
from reports.search.subjects import LANGUAGE, VISION
from tests.bench.card import environment, reason_it_cannot_run

FOLDER = Path(__file__).parent
JOURNAL = FOLDER / "bench.jsonl"
GPU, CAPACITY = "a100-40gb", "8GiB"
LIMITS = ("3GiB", "4GiB", "5GiB", "6GiB", "8GiB", "12GiB")
LENGTHS = (512, 1024)
TIME_LIMIT_S = 400.0
_COPIED_BYTES = 2**20  # values mean nothing, so that copies of much need not be made


def tasks() -> Iterable[dict[str, Any]]:
    """Yield every task, with its key and its card."""
    for limit in LIMITS:
        for finder in FINDERS:
            key = f"{finder} in {limit}"
            yield {"table": "finders", "key": key, "finder": finder, "capacity": limit}
    for model in LANGUAGE:
        for length in LENGTHS:
            yield _ceiling(model, length)
    for model in VISION:
        yield _ceiling(model, None)


def _ceiling(model: str, length: int | None) -> dict[str, Any]:
    key = f"{model}, {length} tokens" if length else model
    task = {"table": "ceilings", "key": key, "model": model, "length": length}
    return {**task, "capacity": CAPACITY}


def run(task: dict[str, Any]) -> Record:
    """Run a task in a process on the bench, and return its record."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "record.json")
        card = environment(gpu=GPU, capacity=task["capacity"], copy_limit=_COPIED_BYTES)
        command = [sys.executable, "-m", "reports.search.on_a_card", json.dumps(task), str(file)]
        try:
            done = subprocess.run(
                command, env=card, capture_output=True, timeout=TIME_LIMIT_S, check=False
            )
        except subprocess.TimeoutExpired:
            return {**task, "error": f"took more than {TIME_LIMIT_S:.0f} s"}
        if not file.exists():
            said = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
            return {**task, "error": f"the process died ({done.returncode}): {said}"}
        return {**task, **json.loads(file.read_text())}


def main(arguments: Sequence[str]) -> int:
    """Run what has no record yet, and write the tables; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m reports.search bench", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--table", choices=("ceilings", "finders"))
    parser.add_argument("--match", metavar="GLOB", default="*", help="only these keys")
    parser.add_argument("--render", action="store_true", help="run nothing")
    options = parser.parse_args(arguments)
    if not options.render:
        if reason := reason_it_cannot_run():
            print(reason, file=sys.stderr)
            return 1
        known = read_journal(JOURNAL)
        for task in tasks():
            chosen = options.table in (None, task["table"])
            if chosen and task["key"] not in known and fnmatch.fnmatch(task["key"], options.match):
                record = run(task)
                print(json.dumps(record), flush=True)
                append(JOURNAL, record)
    records = read_journal(JOURNAL)
    ordered = [records[task["key"]] for task in tasks() if task["key"] in records]
    write_tables(ordered, FOLDER / "README.md")
    return 0 if all(is_right(each) for each in ordered if each["table"] == "ceilings") else 1


def is_right(record: Record) -> bool:
    """Whether n fits and n + 1 does not, both run in a plain loop, at the price that is allowed."""
    if "error" in record:
        return False
    below, above = (_fits(side, record["budget_bytes"]) for side in record["plain"])
    is_cheap = len(record["search"]) <= 3 and not record["ooms"] and record["method"] != "bisection"
    return below and not above and is_cheap


def _fits(side: dict[str, Any], budget_bytes: int) -> bool:
    free = not side["oom"] and not side["alloc_retries"]
    return free and bool(side["reserved_bytes"] <= budget_bytes)


def write_tables(records: Sequence[Record], readme: Path) -> None:
    """Put both tables into a README, each with how it came about."""
    parts = {name: [r for r in records if r["table"] == name] for name in ("ceilings", "finders")}
    made = {
        "ceilings": ceilings_table(parts["ceilings"]),
        "finders": finders_table(parts["finders"]),
    }
    for name, text in made.items():
        begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
        renew_section(readme, begin, end, f"{text}\n\n{_origin()}\n")


def _origin() -> str:
    names = ("torch", "transformers", "timm")
    known = ", ".join(f"{name} {release}" for name, release in versions(*names).items() if release)
    return f"{known}; {today()}."


def ceilings_table(records: Sequence[Record]) -> str:
    heads = ("model", "budget", "executed", "n", "n reserves", "n + 1", "OOMs", "method", "")
    return table(heads, map(_ceiling_cells, records))


def _ceiling_cells(record: Record) -> Iterable[str]:
    if "error" in record:
        return (record["key"], "", "", "", "", "", "", record["error"], "FAILS")
    below, above = record["plain"]
    return (
        record["key"],
        format_bytes(record["budget_bytes"]),
        ", ".join(map(str, record["search"])),
        str(record["at_least"]),
        format_bytes(below["reserved_bytes"]),
        "out of memory" if above["oom"] else format_bytes(above["reserved_bytes"]),
        str(record["ooms"]),
        record["method"],
        "ok" if is_right(record) else "FAILS",
    )


def finders_table(records: Sequence[Record]) -> str:
    heads = ("memory", "finder", "sizes tried", "OOMs", "found", "it trains", "effective batch")
    return table(heads, map(_finder_cells, records))


def _finder_cells(record: Record) -> Iterable[str]:
    begin = (record["capacity"], record["finder"])
    if "error" in record or record.get("version") is None:
        return (*begin, "", "", "", "", record.get("error", "not installed"))
    tried = record["tried"]
    listed = ", ".join(map(str, tried if len(tried) <= 12 else [*tried[:5], "…", *tried[-4:]]))
    trains = "yes" if record.get("trains") else "no: out of memory"
    if record.get("trains") and record.get("alloc_retries"):
        trains = "after retries"
    kept = record["effective"] == 256
    return (
        *begin,
        f"{len(tried)} ({listed})",
        str(record["ooms"]),
        str(record["found"]),
        trains,
        "256, kept" if kept else f"{record['effective']}, not kept",
    )
