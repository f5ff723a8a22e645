"""Time the simulated allocator on the requests of recordings, compiled and as Python.

    python -m reports.speed.allocator FOLDER [--json FILE]

Every block of a recording is allocated and freed in the recorded order, those that were there
before it first. Both are timed in turn in one process, and must reserve and allocate the same.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from autobatch.memory import allocator as compiled
from autobatch.memory.recording import Recording, rewind
from autobatch.memory.snapshot import load_snapshot
from reports.common.of_source import of_source
from reports.common.results import today, versions

LEAST = 1e6
"""Events a second that are wanted."""

ROUNDS = 20

Trace = tuple[list[int], list[int], list[int]]


def trace_of(recording: Recording) -> Trace:
    """Return sizes, events and streams of all blocks of a recording."""
    sizes: list[int] = []
    events: list[int] = []
    streams: list[int] = []
    live: dict[int, int] = {}

    def allocated(address: int, size_bytes: int, stream: int) -> None:
        live[address] = len(sizes)
        events.append(len(sizes))
        sizes.append(size_bytes)
        streams.append(stream)

    for segment in recording.start:
        for block in segment.blocks:
            if block.state == "allocated":
                allocated(block.address, block.requested_bytes, segment.stream)
    for event in recording.events:
        if event.action == "alloc":
            allocated(event.address, event.size_bytes, event.stream)
        elif event.action == "free_completed" and event.address in live:
            events.append(~live.pop(event.address))
    return sizes, events, streams


def seconds_of(module: ModuleType, trace: Trace) -> tuple[float, Any]:
    """Return the time of a replay, and what it ended with."""
    allocator = module.CachingAllocator()
    started = time.perf_counter()
    ends = allocator.run(*trace)
    return time.perf_counter() - started, (ends, allocator.segments())


def measure(trace: Trace) -> dict[str, float]:
    """Return the events a second of both, at their fastest.

    Raises:
        ValueError: they do not end alike.
    """
    seconds: dict[str, float] = {}
    ends = []
    for _ in range(ROUNDS):
        for name, module in (("compiled", compiled), ("python", of_source())):
            took, end = seconds_of(module, trace)
            seconds[name] = min(took, seconds.get(name, took))
            ends.append(end)
    if any(end != ends[0] for end in ends):
        raise ValueError("the compiled allocator and its source differ")
    return {name: len(trace[1]) / took for name, took in seconds.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print a line for each recording, and say whether all are fast enough."""
    parser = argparse.ArgumentParser(prog="python -m reports.speed.allocator")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--json", type=Path, help="file to write the results to")
    options = parser.parse_args(arguments)
    if compiled.__file__.endswith(".py"):
        parser.error("the allocator is not compiled: install autobatch where there is a C compiler")
    found = {}
    for path in sorted(options.folder.glob("*.pickle")):
        snapshot = load_snapshot(path)
        for device, events in snapshot.traces.items():
            if events:
                trace = trace_of(rewind(snapshot, device))
                row = {"events": len(trace[1])} | measure(trace)
                found[path.name] = {key: round(figure) for key, figure in row.items()}
                figures = {name: f"{each:,.0f}" for name, each in found[path.name].items()}
                print(f"{path.name:34} {figures}", flush=True)
    if not found:
        parser.error(f"there is no recording in {options.folder}")
    is_fast = all(each["compiled"] >= LEAST for each in found.values())
    if options.json:
        document = {
            "evidence": "measured",
            "command": "python -m reports.speed.allocator FOLDER",
            "versions": versions(),
            "date": today(),
            "rows": found,
        }
        options.json.write_text(json.dumps(document, indent=2) + "\n")
    return 0 if is_fast else 1


if __name__ == "__main__":
    sys.exit(main())
