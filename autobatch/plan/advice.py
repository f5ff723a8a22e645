"""What `advise` found: what each lever does to memory and time, and what it would take otherwise.

Invariant: every ceiling is that of a plan, and every need was simulated; seconds are estimates.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from autobatch.records.codec import decode, dump_json, encode, parse_versioned
from autobatch.records.footprint import Evidence
from autobatch.report import text
from autobatch.report.document import (
    Bullets,
    Code,
    ContentBlock,
    Document,
    Paragraph,
    Section,
    Table,
    printable,
    told_sections,
)
from autobatch.support.units import format_bytes, format_seconds
from autobatch.support.wording import count

__all__ = ["SCHEMA_VERSION", "Advice", "Choice", "Need", "advice_document"]

SCHEMA_VERSION = 1

_SHOWN = 3
"""Choices whose lines of code are shown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One training run as it could be: with some options of levers, or as it is.

    Attributes:
        options: labels of the options, such as "checkpointing: every block"; none for as it is.
        what: what each does, in a sentence.
        code: what does each in plain PyTorch.
        trainer: arguments of Transformers' `TrainingArguments` that do each; "" where there is
            none.
        changes_numerics: whether training would compute something else.
        fits: whether micro-batch 1 fits.
        reference_bytes: reserved peak at the reference micro-batch of the advice, in windows that
            accumulate where they can; at least this where nothing was executed.
        saved_bytes: how much less that is than as it is; negative where it is more, None where
            nothing was executed.
        ceiling: largest micro-batch that is known to fit; 0 where none does.
        is_ceiling: whether no larger one fits; False where they were not all looked at.
        micro_batch, accumulation_steps: of the plan for the target; 0 where none fits.
        likelihood: how likely the plan is to fit a real GPU; None where it does not fit here.
        window_seconds: estimated time of one update of the whole target; None where the card's
            speed is not known, or nothing fits.
        is_executed: whether windows were executed. Otherwise parameters, buffers, gradients and
            optimizer state, which the options leave as they are, take more than the budget alone.
    """

    options: tuple[str, ...]
    what: tuple[str, ...]
    code: tuple[str, ...]
    trainer: tuple[str, ...]
    changes_numerics: bool
    fits: bool
    reference_bytes: int
    saved_bytes: int | None
    ceiling: int
    micro_batch: int
    accumulation_steps: int
    likelihood: float | None
    window_seconds: float | None
    is_executed: bool = True
    is_ceiling: bool = True

    @property
    def label(self) -> str:
        """The options together, as tables name them."""
        return " + ".join(self.options) or "as it is"


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """Something that would let the run fit without any lever.

    Attributes:
        what: what it is, such as "a larger card".
        value: the least that was found to fit, such as "a100-40gb".
        reserved_bytes: what micro-batch 1 reserves then, on one GPU.
    """

    what: str
    value: str
    reserved_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """What could be done about memory and time, for one workload on one simulated card.

    Attributes:
        model: class name of the module.
        target: effective batch: samples per update over all GPUs.
        gpu: catalogue name of the card.
        budget_bytes: what the run may reserve.
        reference: the micro-batch at which memory is compared: the plan's, or 1 where none fits.
        as_it_is: the run without any option.
        choices: the others; those that fit come first, by estimated time, then by ceiling.
        needs: what would do without a lever, where the run does not fit as it is.
        notes: what the user should know, one line each.
        seconds: time that all of it took.
    """

    model: str
    target: int
    gpu: str
    budget_bytes: int
    reference: int
    as_it_is: Choice
    choices: tuple[Choice, ...]
    needs: tuple[Need, ...]
    notes: tuple[str, ...]
    seconds: float
    evidence: Evidence = "simulated"

    def slowdown(self, choice: Choice) -> float | None:
        """Return the estimated time of a choice by that of the run as it is, where both fit."""
        as_is = self.as_it_is.window_seconds
        return choice.window_seconds / as_is if choice.window_seconds and as_is else None

    @property
    def fitting(self) -> tuple[Choice, ...]:
        """The choices with which the run fits."""
        return tuple(choice for choice in self.choices if choice.fits)

    def to_json(self) -> str:
        """Return the advice as JSON."""
        return dump_json({"schema_version": SCHEMA_VERSION} | encode(self))

    @classmethod
    def from_json(cls, text: str) -> Advice:
        """Read what `to_json` wrote.

        Raises:
            RecordError: it is no such text, or is of another schema.
        """
        return decode(cls, parse_versioned(text, SCHEMA_VERSION, "the advice"))

    def __repr__(self) -> str:
        """Name the answer; `print(advice)` shows the whole."""
        return (
            f"<Advice for {self.model} on {self.gpu}: {_verdict(self)}; "
            f"{count(len(self.choices), 'choice')}, {self.evidence}>"
        )

    def __str__(self) -> str:
        """Render the advice as tables and lines of code."""
        return text.render(advice_document(self))


def advice_document(advice: Advice) -> Document:
    """Return what an advice says: what fits, how fast, and the lines that do it."""
    return Document(
        title=_verdict(advice),
        subtitle=f"{printable(advice.model)}, effective batch {advice.target:,} on "
        f"{printable(advice.gpu)}, {advice.evidence} in {advice.seconds:.1f} s",
        sections=tuple(_sections(advice)),
    )


def _verdict(advice: Advice) -> str:
    as_is, fitting = advice.as_it_is, advice.fitting
    if as_is.fits:
        faster = [c for c in fitting if (advice.slowdown(c) or 1) < 1 and not c.changes_numerics]
        head = f"fits as it is: micro-batch {as_is.micro_batch:,} x {as_is.accumulation_steps:,}"
        return f"{head}; faster with {faster[0].label}" if faster else head
    if fitting:
        return f"does not fit as it is; fits with {fitting[0].label}"
    return "does not fit as it is, nor with any lever" + (
        f"; {advice.needs[0].what} would do ({advice.needs[0].value})" if advice.needs else ""
    )


def _sections(advice: Advice) -> Iterator[Section]:
    yield Section("What each lever does", (_table(advice), Paragraph(_explanation(advice))))
    shown = advice.fitting[:_SHOWN] or advice.choices[:_SHOWN]
    for choice in shown:
        blocks: list[ContentBlock] = [Bullets(choice.what)]
        trainer = ", ".join(filter(None, choice.trainer))
        if trainer:
            blocks.append(Paragraph(f"With Transformers: `TrainingArguments({trainer})`"))
        blocks.append(Code("\n".join(choice.code)))
        yield Section(choice.label, tuple(blocks))
    if advice.needs:
        rows = tuple((n.what, n.value, format_bytes(n.reserved_bytes)) for n in advice.needs)
        yield Section(
            "Without a lever",
            (Table(("it would take", "at least", "reserved a GPU"), "llr", rows),),
        )
    yield from told_sections((), advice.notes)


def _table(advice: Advice) -> Table:
    columns = ("lever", "ceiling", "plan", "certainty", "saved", "estimated time", "numbers")
    every = (advice.as_it_is, *advice.choices)
    return Table(columns, "lrrrrrl", tuple(_row(advice, choice) for choice in every))


def _row(advice: Advice, choice: Choice) -> tuple[str, ...]:
    if choice.fits:
        plan = f"{choice.micro_batch:,} x {choice.accumulation_steps:,}"
        ceiling = f"{choice.ceiling:,}{'' if choice.is_ceiling else '+'}"
    else:
        over = choice.reference_bytes - advice.budget_bytes
        plan = f"{format_bytes(over)} too much" if over > 0 else f"{advice.target:,} at once do not"
        if not choice.is_executed:
            plan = f"at least {plan}"
        ceiling = "-"
    return (
        choice.label,
        ceiling,
        plan,
        "-" if choice.likelihood is None else f"{choice.likelihood:.0%}",
        _saved(choice),
        _time(advice, choice),
        "other" if choice.changes_numerics else "same",
    )


def _saved(choice: Choice) -> str:
    if not choice.options:
        return ""
    return "-" if choice.saved_bytes is None else format_bytes(choice.saved_bytes)


def _time(advice: Advice, choice: Choice) -> str:
    if choice.window_seconds is None:
        return "-"
    slowdown = advice.slowdown(choice)
    times = f" ({slowdown:.2f}x)" if slowdown is not None and choice.options else ""
    return f"{format_seconds(choice.window_seconds)}{times}"


def _explanation(advice: Advice) -> str:
    budget = format_bytes(advice.budget_bytes)
    return (
        f"Ceilings are the largest micro-batches that fit in the budget of {budget}, plans are "
        f"micro-batch x accumulation steps for {count(advice.target, 'sample')}, and what is saved "
        f"is reserved memory at micro-batch {advice.reference:,} in windows that accumulate, where "
        f"they can.{_open_ceilings(advice)} Times are estimates for one update "
        "of the whole target, by a roofline over every operator; they tell which is faster rather "
        "than how fast it is. With other numbers, training computes something else."
        f"{_not_executed(advice)}"
    )


def _open_ceilings(advice: Advice) -> str:
    """Say what a mark beside a ceiling means, where there is one."""
    if all(choice.is_ceiling for choice in (advice.as_it_is, *advice.choices)):
        return ""
    return " Above a ceiling with +, larger ones may fit, which were not looked at."


def _not_executed(advice: Advice) -> str:
    """Say how it is known of some choices that they do not fit."""
    if all(choice.is_executed for choice in advice.choices):
        return ""
    return (
        " Rows with 'at least' needed no simulation: parameters, gradients and optimizer state "
        "alone take that much more than the budget, and the lever leaves them as they are."
    )
