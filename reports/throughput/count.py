"""The work of each row, counted on a simulated card and kept in files, one a row."""

from __future__ import annotations

import pickle
from pathlib import Path

from autobatch.devices.virtual.gpu import VirtualGpu
from autobatch.errors import AutobatchError
from autobatch.gpus.work import WindowWork
from reports.common.command_line import progress_bar
from reports.throughput.rows import Row
from reports.throughput.workloads import settings_of, workload_of

__all__ = ["counted"]

WORKS = "works"


def counted(rows: list[Row], out: Path) -> list[tuple[Row, WindowWork]]:
    """Return rows with their work; what files hold from a run before is not counted again.

    Raises:
        AutobatchError: a row's workload did not run.
    """
    folder = out / WORKS
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    with progress_bar() as bar:
        shown = bar.add_task("rows", total=len(rows))
        for row in rows:
            file = folder / f"{row.key.replace(' ', '-')}.pickle"
            if not file.exists():
                file.write_bytes(pickle.dumps(_counted(row)))
            found.append((row, pickle.loads(file.read_bytes())))
            bar.advance(shown)
    return found


def _counted(row: Row) -> WindowWork:
    with settings_of(row):
        run = VirtualGpu(row.card, counts_work=True).run(
            workload_of(row),
            micro_batch=row.micro_batch,
            accumulation_steps=min(row.accumulation, 2),
        )
    if run.work is None:
        raise AutobatchError(f"{row.key}: no window ran")
    return run.work
