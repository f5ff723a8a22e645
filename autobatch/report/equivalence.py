"""A check of accumulated gradients as a document."""

from __future__ import annotations

from typing import TYPE_CHECKING

from autobatch.report.document import Bullets, Document, Facts, Section, Table, printable

if TYPE_CHECKING:
    from autobatch.equivalence import Equivalence

__all__ = ["equivalence_summary"]

_SHOWN = 5

_TITLES = {
    "random": "random numbers",
    "state": "state that changes between micro-batches",
    "batchnorm": "BatchNorm",
    "layer": "a layer that looks across samples",
    "weight": "the weight of each micro-batch",
    "loss": "a loss that looks across samples",
    "unexplained": "not explained",
}


def equivalence_summary(result: Equivalence) -> Document:
    """Return the verdict, what was compared, the culprits and what to do about them."""
    return Document(
        title=_verdict(result),
        subtitle=f"{printable(result.model)}, loss: {printable(result.loss)}, {result.dtype}",
        sections=(
            Section("", (_facts(result),)),
            Section("Windows compared with the same samples at once", (_windows(result),)),
            *(
                Section(
                    f"Culprit: {_TITLES[culprit.kind]}",
                    (
                        Facts(
                            (
                                ("where", printable(_where(culprit.where))),
                                ("difference", f"{culprit.difference:.2g} by this alone"),
                                ("found", printable(culprit.finding)),
                                ("do", printable(culprit.advice)),
                            )
                        ),
                    ),
                )
                for culprit in result.culprits
            ),
            *(_parameters(result)),
            *(
                (Section("Notes", (Bullets(tuple(map(printable, result.notes))),)),)
                if result.notes
                else ()
            ),
        ),
    )


def _verdict(result: Equivalence) -> str:
    if not result.equivalent:
        return "not equivalent: the accumulated gradient is not that of the whole batch"
    if result.difference > result.tolerance:
        return "equivalent, up to the random numbers that are drawn"
    return "equivalent: the accumulated gradient is that of the whole batch"


def _facts(result: Equivalence) -> Facts:
    return Facts(
        (
            (
                "difference",
                f"{result.difference:.2g} of a parameter's largest gradient as training would "
                f"run; rounding explains {result.tolerance:.0e}",
            ),
            ("weight", f"each micro-batch's loss counts by {printable(result.weight)}"),
        )
    )


def _windows(result: Equivalence) -> Table:
    return Table(
        columns=("micro-batches", "difference", "with random draws held"),
        align="lrr",
        rows=tuple(
            (
                " + ".join(map(str, each.window)),
                f"{each.difference:.2g}",
                f"{each.held_difference:.2g}",
            )
            for each in result.comparisons
        ),
    )


def _parameters(result: Equivalence) -> tuple[Section, ...]:
    worst = sorted(result.parameters.items(), key=lambda item: -item[1])[:_SHOWN]
    rows = tuple((printable(name), f"{value:.2g}") for name, value in worst)
    return (
        Section("Parameters that differ most", (Table(("parameter", "difference"), "lr", rows),)),
    )


def _where(names: tuple[str, ...]) -> str:
    shown = ", ".join(name or "the model itself" for name in names[:_SHOWN])
    return f"{shown} and {len(names) - _SHOWN} more" if len(names) > _SHOWN else shown
