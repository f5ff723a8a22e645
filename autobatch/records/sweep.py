"""What a sweep tried, as a plain record: every configuration, and what became of it.

Invariant: a time says whether it was measured or is an estimate, memory whether it was measured or
simulated; a configuration that was pruned was not executed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from autobatch.records.footprint import Evidence

__all__ = ["Outcome", "SweepRecord", "SweepTrial", "front_of"]

Outcome = Literal["finished", "does not fit", "pruned", "cannot be had", "failed"]
"""Of a trial: it ran; it ran and does not fit; it need not run; its levers do not go together, or
not with its micro-batch or this model; its workload failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepTrial:
    """One configuration: settings of levers, and a micro-batch.

    Attributes:
        number: of the trial in Optuna's study.
        settings: by lever, "as it is" where it changes nothing; and what levers of the user's own
            were given, as text.
        micro_batch: samples in one forward/backward on one GPU.
        accumulation_steps: micro-batches between two updates.
        outcome: what became of it.
        reason: why it does not fit, was pruned, cannot be had or failed; None where it finished.
        seconds: of a training window; None where it did not finish.
        reserved_bytes: most that the allocator held; None where it did not run.
        executions: runs of two windows that it cost on the card, simulated or not.
        simulations: runs on a simulated card that came before those on a real one.
        changes_numerics: whether training computes something else than as it is.
    """

    number: int
    settings: Mapping[str, str]
    micro_batch: int
    accumulation_steps: int
    outcome: Outcome
    reason: str | None = None
    seconds: float | None = None
    reserved_bytes: int | None = None
    executions: int = 0
    simulations: int = 0
    changes_numerics: bool = False

    @property
    def changes(self) -> Mapping[str, str]:
        """The settings that change something."""
        return {lever: value for lever, value in self.settings.items() if value != "as it is"}

    @property
    def is_as_it_is(self) -> bool:
        """Whether no lever changes anything."""
        return not self.changes

    @property
    def label(self) -> str:
        """What is changed, in a few words.

        >>> SweepTrial(
        ...     number=0,
        ...     settings={"precision": "as it is", "checkpointing": "every block"},
        ...     micro_batch=8,
        ...     accumulation_steps=2,
        ...     outcome="finished",
        ... ).label
        'checkpointing: every block'
        """
        return (
            " + ".join(f"{lever}: {value}" for lever, value in self.changes.items()) or "as it is"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepRecord:
    """Every trial of a study, and what was asked.

    Attributes:
        model: class name of the module.
        gpu: name of the card.
        target: the effective batch.
        world_size: GPUs that share it.
        budget_bytes: what a run may reserve.
        memory: how reserved bytes are known.
        time: how seconds are known.
        trials: in the order of the study, those of other workers and earlier runs included.
        configurations: how many there are; None where the space is too large to be counted.
        left: of these, how many were not looked at, because time or trials were up; 0 where their
            number is not known.
        sampler: what proposed them: "whole space", or the name of an Optuna sampler.
        study: its name.
        storage: where it is kept; None in memory.
        code: of each setting of a finished trial, as "lever: value", the lines that do it.
        seconds: wall time of this sweep.
        warnings: what its user must act on, one line each.
        notes: what was inferred, assumed or left out, one line each.
    """

    model: str
    gpu: str
    target: int
    world_size: int
    budget_bytes: int
    memory: Evidence
    time: Literal["measured", "estimate"]
    trials: tuple[SweepTrial, ...]
    configurations: int | None
    left: int
    sampler: str
    study: str
    storage: str | None
    code: Mapping[str, str]
    seconds: float
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def front(self) -> tuple[SweepTrial, ...]:
        """Finished trials that no other is faster and smaller than, the fastest first."""
        return front_of(self.trials)

    @property
    def best(self) -> SweepTrial:
        """The fastest finished trial; of equals, the one that takes least memory."""
        return self.front[0]

    @property
    def as_it_is(self) -> SweepTrial | None:
        """The fastest finished trial without any change; None where none fits."""
        unchanged = front_of(trial for trial in self.trials if trial.is_as_it_is)
        return unchanged[0] if unchanged else None

    @property
    def executions(self) -> int:
        """Runs of two windows on the card, of all trials."""
        return sum(trial.executions for trial in self.trials)

    def count(self, outcome: Outcome) -> int:
        """Return how many trials ended so."""
        return sum(trial.outcome == outcome for trial in self.trials)


def front_of(trials: Iterable[SweepTrial]) -> tuple[SweepTrial, ...]:
    """Return the finished trials that no other is at least as good as in time and memory.

    Of equals, the one that changes least stays.
    """
    finished = [trial for trial in trials if trial.seconds is not None]
    ordered = sorted(finished, key=_rank)
    front: list[SweepTrial] = []
    for trial in ordered:
        assert trial.reserved_bytes is not None
        if not front or trial.reserved_bytes < (front[-1].reserved_bytes or 0):
            front.append(trial)
    return tuple(front)


def _rank(trial: SweepTrial) -> tuple[float, float, int, int]:
    assert trial.seconds is not None and trial.reserved_bytes is not None
    return trial.seconds, trial.reserved_bytes, len(trial.changes), trial.number
