"""What a recorded memory snapshot shows, as users hold it.

Invariant: what was recorded is called measured, and what other settings would do, simulated.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from autobatch.memory.explanation import explain_snapshot, load_for_explanation
from autobatch.records.codec import dump_json, encode
from autobatch.records.explanation import DeviceExplanation, ExplanationRecord
from autobatch.report import text
from autobatch.report.explanation_summary import chart_of, explanation_summary, is_drawn
from autobatch.report.own_files import report_folder
from autobatch.support.files import write_text
from autobatch.support.units import format_bytes

__all__ = ["SCHEMA_VERSION", "Explanation", "explain"]

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation(ExplanationRecord):
    """What a memory snapshot shows, by device; `print` shows all of it.

    Attributes:
        source: the file, as it was named.
        devices: those of which the snapshot shows anything.
    """

    def to_json(self) -> str:
        """Render the explanation as JSON text; sizes are in bytes, and events count from 0."""
        return dump_json({"schema_version": SCHEMA_VERSION} | encode(self))

    def report(self, folder: str | os.PathLike[str]) -> Path:
        """Write report.html, report.md, explanation.json and charts into a folder.

        Returns:
            The path of report.html, which opens from disk.

        Raises:
            FileError: the folder or a file in it cannot be written.
        """
        from autobatch.report import html, markdown

        document = explanation_summary(self)
        recorded = [device for device in self.devices if is_drawn(device)]
        with report_folder("explanation", folder, has_charts=bool(recorded)) as (target, charts):
            write_text(target / "explanation.json", self.to_json())
            drawings = _write_charts(recorded, charts)
            write_text(target / "report.md", markdown.render(document))
            return write_text(target / "report.html", html.page(document, drawings))

    def __repr__(self) -> str:
        """Name what is shown; `print(explanation)` shows the whole."""
        peaks = ", ".join(
            f"device {each.device} reserved {format_bytes(each.peak_reserved_bytes)}"
            for each in self.devices
        )
        return f"<Explanation of {self.source}: {peaks or 'no device'}>"

    def __str__(self) -> str:
        """Render the explanation as plain text."""
        return text.render(explanation_summary(self))


def explain(
    path: str | Path, *, device: int | None = None, settings: Sequence[str] = (), top: int = 10
) -> Explanation:
    """Say what held the memory of a recorded PyTorch memory snapshot, and what else would do.

    The snapshot is what `torch.cuda.memory._dump_snapshot(path)` writes after
    `torch.cuda.memory._record_memory_history()`. Nothing in the file is run. What was recorded is
    measured; under other allocator settings the recorded requests are simulated.

    Args:
        path: of the snapshot.
        device: index of the only device to explain; all that the snapshot shows if None.
        settings: texts of PYTORCH_CUDA_ALLOC_CONF to try, beside the usual ones, such as
            `["max_split_size_mb:256", "roundup_power2_divisions:8"]`.
        top: how many of the largest blocks to name; those alike count once.

    Raises:
        FileError: the file cannot be read, or is no snapshot of data alone.
        UsageError: the snapshot shows nothing of the device, or PyTorch would refuse a setting.

    Example:
        >>> print(explain("snapshot.pickle"))  # doctest: +SKIP
    """
    if isinstance(settings, str):
        settings = [settings]
    record = explain_snapshot(
        load_for_explanation(path), str(path), device=device, settings=settings, top=top
    )
    return Explanation(**{each.name: getattr(record, each.name) for each in fields(record)})


def _write_charts(recorded: Sequence[DeviceExplanation], charts: Path) -> dict[str, str]:
    """Draw what each device with a history held over time; return the drawings by name."""
    if not recorded:
        return {}
    from autobatch.report.charts.frame import save, style
    from autobatch.report.charts.history import draw_history

    with style():
        return {
            chart_of(device): save(draw_history(device), charts, chart_of(device))
            for device in recorded
        }
