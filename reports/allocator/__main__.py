"""Print how far the simulated allocator agrees with recorded traces.

    python -m reports.allocator FOLDER [--json FILE]

Exit code 0 when everything that can be checked matches, 1 when something differs or a file
cannot be loaded, 2 when there is nothing to check.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from autobatch.errors import FileError
from autobatch.memory.recording import rewind
from autobatch.memory.snapshot import load_snapshot
from reports.allocator.score import Score, replay

SUFFIXES = (".pickle", ".pkl", ".p")
HEADER = ("recording", "events", "block choices", "segment sizes", "releases", "final bytes")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """The result for one device of one file.

    Attributes:
        score: None where nothing could be replayed.
        inconsistent: how the recording contradicts itself; None where it does not.
        unreadable: why the file could not be loaded; None where it could.
    """

    name: str
    score: Score | None = None
    inconsistent: str | None = None
    unreadable: str | None = None

    @property
    def passes(self) -> bool:
        """Whether nothing speaks against the simulation here."""
        if self.unreadable:
            return False
        return self.score is None or self.inconsistent is not None or self.score.agrees


def check_file(path: Path, name: str) -> Iterator[Row]:
    """Replay every device of one snapshot."""
    try:
        snapshot = load_snapshot(path)
    except FileError as error:
        yield Row(name=name, unreadable=str(error))
        return
    devices = [device for device, trace in snapshot.traces.items() if trace]
    if not devices:
        yield Row(name=name)
    for device in devices:
        recording = rewind(snapshot, device)
        yield Row(
            name=name if len(devices) == 1 else f"{name} (device {device})",
            score=replay(recording, snapshot.segments.get(device, ()), snapshot.settings),
            inconsistent=recording.contradiction,
        )


def _share(matched: int, total: int) -> str:
    """Write a share so that only an exact match reads 100 %."""
    if total == 0:
        return "none"
    percent = 100.0 if matched == total else min(matched / total * 100, 99.99)
    return f"{matched} of {total} ({percent:.{0 if matched == total else 2}f} %)"


def _cells(row: Row) -> tuple[str, ...]:
    score = row.score
    if score is None:
        return (row.name, "not loaded" if row.unreadable else "none recorded", "", "", "", "")
    final = [
        f"{name} {'equal' if recorded == simulated else f'{simulated:,} B, not {recorded:,} B'}"
        for name, (recorded, simulated) in (
            ("reserved", score.reserved_bytes),
            ("allocated", score.allocated_bytes),
        )
    ]
    return (
        row.name,
        str(score.events),
        _share(score.blocks_matched, score.blocks),
        _share(score.segments_matched, score.segments),
        _share(score.releases_matched, score.releases),
        ", ".join(final),
    )


def _notes(row: Row) -> Iterator[str]:
    if row.unreadable:
        yield row.unreadable
    if row.inconsistent:
        yield (
            f"{row.name}: the recording contradicts itself and does not count; only what follows"
            f" was replayed: {row.inconsistent}"
        )
    if row.score and row.score.first_difference:
        yield f"{row.name}: first difference: {row.score.first_difference}"
    if row.score and row.score.ties:
        yield f"{row.name}: {row.score.ties} choices of free blocks of one size were taken over"
    if row.score and row.score.segments_unused:
        yield f"{row.name}: {row.score.segments_unused} new segments served no allocation at once"


def _print(rows: Sequence[Row]) -> None:
    counted = [row.score for row in rows if row.score and not row.inconsistent]
    table = [HEADER, *(_cells(row) for row in rows)]
    equal = sum(
        score.reserved_bytes[0] == score.reserved_bytes[1]
        and score.allocated_bytes[0] == score.allocated_bytes[1]
        for score in counted
    )
    table.append(
        (
            f"all {len(counted)} consistent",
            str(sum(score.events for score in counted)),
            _share(sum(s.blocks_matched for s in counted), sum(s.blocks for s in counted)),
            _share(sum(s.segments_matched for s in counted), sum(s.segments for s in counted)),
            _share(sum(s.releases_matched for s in counted), sum(s.releases for s in counted)),
            f"equal in {equal} of {len(counted)}",
        )
    )
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for cells in table:
        padded = [cell.ljust(width) for cell, width in zip(cells, widths, strict=True)]
        print("  ".join(padded).rstrip())
    for row in rows:
        for note in _notes(row):
            print(note)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the check; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m reports.allocator", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("folder", type=Path, help="folder of snapshots, searched to its leaves")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures as JSON")
    options = parser.parse_args(arguments)
    if not options.folder.is_dir():
        print(f"{options.folder} is not a folder: name one that holds snapshots", file=sys.stderr)
        return 2
    paths = sorted(path for path in options.folder.rglob("*") if path.suffix in SUFFIXES)
    if not paths:
        print(f"{options.folder} holds no file named *{', *'.join(SUFFIXES)}", file=sys.stderr)
        return 2
    rows = [
        row for path in paths for row in check_file(path, str(path.relative_to(options.folder)))
    ]
    _print(rows)
    if options.json:
        report = [{**asdict(row), "passes": row.passes} for row in rows]
        try:
            options.json.write_text(json.dumps(report, indent=2) + "\n")
        except OSError as error:
            print(f"cannot write {options.json}: {error.strerror}", file=sys.stderr)
            return 2
    return 0 if all(row.passes for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
