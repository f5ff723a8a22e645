"""The result of a check as immutable records, and as a document to print."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from autobatch.records.codec import dump_json, encode
from autobatch.report import text
from autobatch.report.document import Document, Facts, Section, Table, printable, told_sections
from autobatch.support.wording import listed

__all__ = ["SCHEMA_VERSION", "Comparison", "Culprit", "Equivalence", "Kind", "equivalence_summary"]

SCHEMA_VERSION = 2

Kind = Literal[
    "random", "hook", "state", "batchnorm", "layer", "weight", "loss", "undecided", "unexplained"
]

_SHOWN = 5

_TITLES = {
    "random": "random numbers",
    "hook": "a hook of gradients",
    "state": "state that changes between micro-batches",
    "batchnorm": "BatchNorm",
    "layer": "a layer that looks across samples",
    "weight": "the weight of each micro-batch",
    "loss": "a loss that looks across samples",
    "undecided": "not decided",
    "unexplained": "not explained",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One window of micro-batches, compared with the same samples at once.

    A difference is the largest, over all parameters, of max|window - batch| / max|batch|, where
    max|batch| is raised to a thousandth of the model's largest gradient, because smaller gradients,
    such as that of a bias before a BatchNorm, are zero up to rounding.

    Attributes:
        window: samples of each micro-batch.
        difference: with random draws, as in training.
        held_difference: where each micro-batch gets its rows of the batch's random draws.
    """

    window: tuple[int, ...]
    difference: float
    held_difference: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Culprit:
    """One cause of a difference, found by removing it.

    Attributes:
        kind: "random" draws (dropout), a "hook" that changes gradients or steps, "state" that
            changes from one micro-batch to the next, "batchnorm", another "layer" that mixes
            samples, a "weight" other than the number of samples, a "loss" that mixes samples,
            "undecided" where draws cannot be given by sample, or "unexplained".
        where: names of the modules, or the expression or part concerned.
        difference: between the gradients while all other culprits are removed; with other labels or
            masks than those of the sample where the finding says so.
        finding: what was observed, in one sentence.
        advice: what to do, in one sentence.
    """

    kind: Kind
    where: tuple[str, ...]
    difference: float
    finding: str
    advice: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Equivalence:
    """Whether the gradient of a window equals that of its samples at once, and if not, why.

    Attributes:
        equivalent: whether the gradients agree within the tolerance where each micro-batch gets its
            rows of the batch's random draws, and go on agreeing where samples have unequal lengths
            or unequal counts of labels, masked entries or boxes. Dropout alone leaves it True:
            window and batch draw different numbers from the same distribution. None, which is no
            proof either, where nothing but draws that cannot be given by sample makes a difference,
            or where it depends on the side of the padding, of which the sample has none.
        model: class name of the module.
        loss: how the loss was obtained, as in `ModelFacts`; "mean of the outputs" where there was
            none.
        weight: what each micro-batch's loss was weighted by.
        dtype: of parameters, inputs and arithmetic.
        tolerance: the largest difference in this dtype that counts as rounding.
        comparisons: the windows that were compared.
        parameters: the largest difference of each parameter, with random draws as in training.
        culprits: the causes found.
        notes: what was compared instead of what was asked for, and what else was observed.
        seconds: wall time of the check.
        rounding: the difference in mixed precision, where that was asked for.
    """

    equivalent: bool | None
    model: str
    loss: str
    weight: str
    dtype: str
    tolerance: float
    comparisons: tuple[Comparison, ...]
    parameters: Mapping[str, float]
    culprits: tuple[Culprit, ...]
    notes: tuple[str, ...]
    seconds: float
    rounding: float | None = None

    @property
    def difference(self) -> float:
        """The largest difference of all windows, with random draws as in training."""
        return max(each.difference for each in self.comparisons)

    @property
    def held_difference(self) -> float:
        """The largest difference where micro-batches have their rows of the batch's draws."""
        return max(each.held_difference for each in self.comparisons)

    def to_json(self) -> str:
        """Render the result as JSON text, with `difference` as an entry of its own."""
        header = {"schema_version": SCHEMA_VERSION, "difference": self.difference}
        return dump_json(header | encode(self))

    def __str__(self) -> str:
        """Render the result as plain text, the verdict first."""
        return text.render(equivalence_summary(self))


def equivalence_summary(result: Equivalence) -> Document:
    """Return the document of a result: the verdict, what was compared, culprits and advice."""
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
            Section("Parameters that differ most", (_parameters(result),)),
            *told_sections((), result.notes),
        ),
    )


def _verdict(result: Equivalence) -> str:
    if result.equivalent is None and result.held_difference <= result.tolerance:
        return "undecided: equal for this sample, but perhaps not for samples of unequal lengths"
    if result.equivalent is None:
        return "undecided: random draws that cannot be given by sample make a difference"
    if not result.equivalent and result.held_difference <= result.tolerance:
        if any(each.where == ("the loss",) for each in result.culprits):
            return (
                "not equivalent: equal for this sample by chance, as samples interact in the loss"
            )
        return "not equivalent: equal for this sample, but not for samples of unequal counts"
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
            *(
                (("rounding", f"{result.rounding:.2g} in mixed precision"),)
                if result.rounding is not None
                else ()
            ),
            ("weight", f"each micro-batch's loss counts by {printable(result.weight)}"),
        )
    )


def _windows(result: Equivalence) -> Table:
    return Table(
        columns=("micro-batches", "difference", "with the batch's draws"),
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


def _parameters(result: Equivalence) -> Table:
    worst = sorted(result.parameters.items(), key=lambda item: -item[1])[:_SHOWN]
    rows = tuple((printable(name), f"{value:.2g}") for name, value in worst)
    return Table(("parameter", "difference"), "lr", rows)


def _where(names: tuple[str, ...]) -> str:
    return listed([name or "the model itself" for name in names], _SHOWN)
