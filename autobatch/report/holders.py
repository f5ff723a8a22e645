"""Which tensors, layers and operators hold the memory at a plan's peak, as tables.

Invariant: the rows of each table sum to the peak, with those that are too small to be named in a
row of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter

from autobatch.records.holders import Holder, PeakBlocks
from autobatch.records.plan_record import PlanRecord
from autobatch.report.document import Paragraph, Section, Table, printable
from autobatch.report.footprint_summary import share
from autobatch.support.units import format_bytes

__all__ = ["Patterns", "holder_sections", "tensor_text"]

_BLOCKS, _MODULES, _OPS = 15, 12, 10
"""How many rows are named."""

_OUTSIDE = "outside of modules"
_UNKNOWN = "not known"


@dataclass(frozen=True, slots=True)
class _Group:
    """Blocks that differ in nothing but the numbers in their modules' names."""

    holder: Holder
    modules: int
    blocks: int
    size_bytes: int


def holder_sections(plan: PlanRecord) -> tuple[Section, ...]:
    """Return the sections about blocks, modules and operators; none where they are not known."""
    if not plan.peak_blocks:
        return ()
    patterns = Patterns(blocks.holder.module for blocks in plan.peak_blocks)
    return (
        Section(
            "Largest blocks at the peak",
            (
                Paragraph(
                    "Tensors of equal layers are in one row: `*` stands for the layers' numbers."
                ),
                _blocks(plan, patterns),
            ),
        ),
        Section("By module at the peak", (_modules(plan, patterns),)),
        Section("By operator at the peak", (_ops(plan),)),
    )


class Patterns:
    """Names of modules in which a star stands for the number of a layer.

    A layer is a numbered module with modules inside; a number alone, as in a small
    `nn.Sequential`, tells what the module is.

    >>> Patterns(["h.7.mlp.0", "h.8.mlp.0"]).of("h.7.mlp.0")
    'h.*.mlp.0'
    """

    def __init__(self, modules: Iterable[str]) -> None:
        """Learn which modules have others inside."""
        self._parents = {
            tuple(parts[:length])
            for parts in (module.split(".") for module in set(modules))
            for length in range(1, len(parts))
        }

    def of(self, module: str) -> str:
        """Return a module's name with a star for each layer's number."""
        parts = module.split(".")
        return ".".join(
            "*" if part.isdecimal() and tuple(parts[: index + 1]) in self._parents else part
            for index, part in enumerate(parts)
        )


def tensor_text(holder: Holder) -> str:
    """Describe a tensor by shape and type; a kernel's scratch is no tensor.

    >>> tensor_text(Holder(module="", op="mm", category="activations", phase="forward",
    ...     shape=(16, 8), dtype="float32", where=""))
    '16 × 8 float32'
    """
    if not holder.dtype:
        return "scratch" if holder.op else "memory"
    shape = " × ".join(map(str, holder.shape)) or "scalar"
    return f"{shape} {holder.dtype}"


def _blocks(plan: PlanRecord, patterns: Patterns) -> Table:
    groups = _grouped(
        plan.peak_blocks,
        lambda h: (patterns.of(h.module), h.op, h.category, h.shape, h.dtype, h.where),
    )
    located = any(group.holder.where for group in groups[:_BLOCKS])
    rows: list[tuple[str, ...]] = [
        (
            printable(tensor_text(group.holder)),
            group.holder.category,
            printable(patterns.of(group.holder.module)) or _OUTSIDE,
            printable(group.holder.op) or _UNKNOWN,
            *((printable(group.holder.where) or "-",) if located else ()),
            f"{group.blocks:,}",
            format_bytes(group.size_bytes),
            share(group.size_bytes, plan.footprint.peak_allocated_bytes),
        )
        for group in groups[:_BLOCKS]
    ]
    blank = ("",) * (4 if located else 3)
    rows += _rest(groups[_BLOCKS:], plan, "smaller blocks", blank, lambda group: group.blocks)
    columns = ("tensor", "category", "module", "operator", *(("line",) if located else ()))
    return Table(
        columns=(*columns, "blocks", "size", "share"),
        align="l" * len(columns) + "rrr",
        rows=tuple(rows),
        totals=_last(rows),
    )


def _modules(plan: PlanRecord, patterns: Patterns) -> Table:
    groups = _grouped(plan.peak_blocks, lambda holder: patterns.of(holder.module))
    rows: list[tuple[str, ...]] = [
        (
            printable(patterns.of(group.holder.module)) or _OUTSIDE,
            f"{group.modules:,}",
            format_bytes(group.size_bytes),
            share(group.size_bytes, plan.footprint.peak_allocated_bytes),
        )
        for group in groups[:_MODULES]
    ]
    rows += _rest(groups[_MODULES:], plan, "other modules", (), lambda group: group.modules)
    return Table(("module", "modules", "size", "share"), "lrrr", tuple(rows), _last(rows))


def _ops(plan: PlanRecord) -> Table:
    groups = _grouped(plan.peak_blocks, attrgetter("op"))
    rows: list[tuple[str, ...]] = [
        (
            printable(group.holder.op) or _UNKNOWN,
            f"{group.blocks:,}",
            format_bytes(group.size_bytes),
            share(group.size_bytes, plan.footprint.peak_allocated_bytes),
        )
        for group in groups[:_OPS]
    ]
    rows += _rest(groups[_OPS:], plan, "other operators", (), lambda group: group.blocks)
    return Table(("operator", "blocks", "size", "share"), "lrrr", tuple(rows), _last(rows))


def _last(rows: Sequence[object]) -> frozenset[int]:
    return frozenset({len(rows) - 1})


def _grouped(blocks: Iterable[PeakBlocks], key: Callable[[Holder], Hashable]) -> Sequence[_Group]:
    """Return blocks together whose holders have the same key, most bytes first."""
    alike: dict[Hashable, list[PeakBlocks]] = {}
    for each in blocks:
        alike.setdefault(key(each.holder), []).append(each)
    groups = (
        _Group(
            holder=group[0].holder,
            modules=len({each.holder.module for each in group}),
            blocks=sum(each.count for each in group),
            size_bytes=sum(each.size_bytes for each in group),
        )
        for group in alike.values()
    )
    return sorted(groups, key=lambda group: -group.size_bytes)


def _rest(
    groups: Sequence[_Group],
    plan: PlanRecord,
    what: str,
    blank: tuple[str, ...],
    number_of: Callable[[_Group], int],
) -> list[tuple[str, ...]]:
    """Return the rows of what has none of its own, of rounding, and of the sum."""
    peak = plan.footprint.peak_allocated_bytes
    known = sum(blocks.size_bytes for blocks in plan.peak_blocks)
    lines = [(what, sum(map(number_of, groups)), sum(group.size_bytes for group in groups))]
    lines.append(("rounding by the allocator", 0, peak - known))
    lines.append(("= peak allocated", 0, peak))
    return [
        (name, *blank, f"{number:,}" if number else "", format_bytes(size), share(size, peak))
        for name, number, size in lines
        if size
    ]
