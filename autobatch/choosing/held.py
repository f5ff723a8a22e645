"""What a study holds at one moment.

Invariant: of each configuration that needs no run there is one trial, whoever wrote more of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from autobatch.choosing.known import Known
from autobatch.choosing.space import MICRO_BATCH
from autobatch.choosing.study import Seen, SweepStudy
from autobatch.records.sweep import SweepTrial

__all__ = ["Held"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """What a study held when it was looked at.

    Attributes:
        trials: that ended, by the key of their configuration.
        params: of each of them, by its number.
        running: trials that workers are at.
        known: what the trials tell of those that have not run.
    """

    trials: Mapping[str, SweepTrial]
    params: Mapping[int, Mapping[str, Any]]
    running: Sequence[Seen]
    known: Known

    @classmethod
    def by(cls, study: SweepStudy, margin: float) -> Held:
        """Read a study, and count as cut what workers that died were at.

        Args:
            study: to read.
            margin: by which share larger micro-batches may be slower.
        """
        seen = study.seen()
        study.release_cut(seen)
        by_key: dict[str, Seen] = {}
        for each in seen:
            if each.is_done and each.key is not None:
                # another worker may have run what this one pruned, or pruned it at the same instant
                known = by_key.get(each.key)
                if known is None or known.facts["outcome"] == "pruned":
                    by_key[each.key] = each
        trials = {key: _trial(each) for key, each in by_key.items()}
        return cls(
            trials=trials,
            params={each.number: each.params for each in by_key.values()},
            running=[each for each in seen if each.is_running],
            known=Known(trials.values(), margin),
        )

    @property
    def taken(self) -> set[str | None]:
        """Keys of the configurations that need no run, or have one."""
        return {*self.trials, *(each.key for each in self.running)}

    @property
    def finished(self) -> list[SweepTrial]:
        """The trials that fit, and have a time."""
        return [trial for trial in self.trials.values() if trial.outcome == "finished"]

    @property
    def runs(self) -> int:
        """How many configurations ran, or run now; one that was simulated alone counts, too."""
        ran = (
            trial.executions > 0 or trial.outcome not in ("pruned", "cannot be had")
            for trial in self.trials.values()
        )
        return sum(ran) + len(self.running)


def _trial(seen: Seen) -> SweepTrial:
    """Return a trial of the study as a record."""
    facts, params = seen.facts, dict(seen.params)
    size = params.pop(MICRO_BATCH)
    return SweepTrial(
        number=seen.number,
        settings={name: str(value) for name, value in params.items()},
        micro_batch=size,
        accumulation_steps=facts.get("accumulation steps", 0),
        outcome=facts["outcome"],
        reason=facts.get("reason"),
        seconds=seen.values[0] if seen.values else None,
        reserved_bytes=int(seen.values[1]) if seen.values else facts.get("reserved bytes"),
        executions=facts.get("executions", 0),
        simulations=facts.get("simulations", 0),
        changes_numerics=facts.get("changes numerics", False),
    )
