"""What levers do to a training run: each is simulated, on its own and with others.

What parameters, gradients and optimizer state alone keep from fitting is not executed with levers
that leave these as they are.

Invariant: a ceiling that is told is that of the plan which `tune` makes for the changed workload;
what changes numbers is tried with others only where that was asked for, or nothing else fits.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, combinations
from typing import TYPE_CHECKING, Any

from torch import nn

from autobatch.devices.choose import Gpu, described
from autobatch.devices.preserve import answering
from autobatch.devices.virtual.ahead import Task, run_ahead
from autobatch.devices.virtual.gpu import identity_of
from autobatch.devices.virtual.sharing import SharedRuns
from autobatch.errors import AutobatchError
from autobatch.levers.known import LEVERS, levers_named
from autobatch.levers.lever import Lever, Option, WrongLeverError, applied
from autobatch.levers.own import OwnLevers
from autobatch.levers.setup import Setup
from autobatch.plan.advice import Advice, Choice, Need
from autobatch.plan.plan import Plan
from autobatch.records.progress import Progress, ProgressCallback, silent
from autobatch.support.wording import one_line, said_by
from autobatch.tuning.candidate import Candidate
from autobatch.tuning.needs import Needs, Resized
from autobatch.tuning.workloads import checked_target, workload_of
from autobatch.workload.complete import Asked, WorkloadOptions, require_options
from autobatch.workload.workload import Workload

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Search", "advise"]

_NOTABLE = 0.01
"""A lever that saves less than this share of the peak is not combined with others."""

_TOGETHER = 4
"""Levers in one combination, at most."""

_ENOUGH = 2
"""After so many that fit, one more lever is not added."""

_PAIRED = 3
"""So many of those that save most are tried in pairs."""

_USUALLY_SAVE_MOST = ("attention", "checkpointing", "offload", "loss")
"""Levers of activations, in the order in which they are added to others where what they save is not
known."""


@answering()
def advise(
    model: nn.Module | Workload | Callable[[], nn.Module | Workload],
    *,
    target: int,
    gpu: Gpu = None,
    levers: Iterable[str | Lever] | None = None,
    allow_numerics: bool = False,
    headroom: float | None = None,
    resized: tuple[str, int, Resized] | None = None,
    progress: ProgressCallback = silent,
    **options: Unpack[WorkloadOptions],
) -> Advice:
    """Say what each lever would do to memory and time, and what would make the run fit.

    Always simulated; a device of this machine stands for a card like it. Every lever is applied to
    copies and run, on its own, and those that save most together.

    Args:
        model: as in `tune`.
        target: effective batch: samples per optimizer update over all GPUs.
        gpu: the card.
        levers: names from `docs/levers.md`, or levers of your own; all if None.
        allow_numerics: combine levers with which training computes something else, too; on their
            own they are always shown, and marked.
        resized: the name of a size, such as "seq", what it is now, and a function that builds the
            model for another one; where nothing fits, the largest size that does is looked for.
        headroom: share of the usable memory to leave free, in [0, 1); None leaves what
            `autobatch.gpus.uncertainty` asks for.
        progress: told of each step.
        **options: how the model trains, as `tune` takes it: sample, batch_dims, loss, optimizer,
            autocast, clip_norm, world_size and sharding.

    Raises:
        UsageError: an argument cannot be understood, or a lever of your own changes the model in
            place or returns what it must not; the subclass says which kind.
        WorkloadError: the model, loss or optimizer failed.

    >>> advice = advise(nn.Linear(64, 8), target=32, gpu="t4", levers=["precision"])
    >>> advice.as_it_is.fits, advice.choices[0].changes_numerics
    (True, True)
    """
    require_options(advise, options)
    asked = Asked(model=model, **options)
    target = checked_target(target, asked.world_size, headroom)
    chosen = list(LEVERS.values()) if levers is None else levers_named(levers)
    setup = Setup(workload=workload_of(asked, gpu), gpu=described(gpu))
    own = OwnLevers(setup)
    search = Search(setup, asked, target, headroom, progress, own=own)
    return search.advice(own.checked(chosen), allow_numerics=allow_numerics, resized=resized)


@dataclass(frozen=True, slots=True)
class _Tried:
    """A choice, and the options behind it."""

    choice: Choice
    options: tuple[Option, ...]


@dataclass(slots=True)
class Search:
    """Tries one setup with options.

    Attributes:
        setup: the run as it is.
        asked: what it was made of.
        target: effective batch.
        headroom: share of the usable memory to leave free, or None for the default.
        progress: told of each step.
        seconds: time after which nothing more is tried; None for no such limit.
        own: calls levers of the user's own; None where none can be.
        tried: what was tried so far.
        notes: what could not be tried, and why.
    """

    setup: Setup
    asked: Asked
    target: int
    headroom: float | None
    progress: ProgressCallback
    seconds: float | None = None
    own: OwnLevers | None = None
    tried: list[_Tried] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    _started: float = field(default_factory=time.perf_counter)
    _reference: int = 1
    _as_is: Choice = field(init=False)
    _runs: SharedRuns = field(default_factory=SharedRuns)
    _setups: dict[tuple[str, ...], Setup] = field(default_factory=dict)
    _lasting: dict[frozenset[str], int] = field(default_factory=dict)

    def advice(
        self,
        levers: Sequence[Lever],
        *,
        allow_numerics: bool,
        resized: tuple[str, int, Resized] | None,
    ) -> Advice:
        """Try everything, and put the answer together."""
        choices = self.choices(levers, allow=allow_numerics)
        needs = () if self._as_is.fits else tuple(self._needs(resized))
        return Advice(
            model=type(self.setup.workload.model).__name__,
            target=self.target,
            gpu=self.setup.gpu.name,
            budget_bytes=self._candidate(self.setup).budget_bytes,
            reference=self._reference,
            as_it_is=self._as_is,
            choices=tuple(choices),
            needs=needs,
            notes=tuple(dict.fromkeys((*self.setup.workload.notes, *self.notes))),
            seconds=time.perf_counter() - self._started,
        )

    def choices(self, levers: Sequence[Lever], *, allow: bool) -> list[Choice]:
        """Return what was tried, the best first; `allow` combines what changes numbers, too."""
        self._as_is = self._as_it_is()
        alone = [(option,) for lever in levers for option in self._options(lever)]
        run_ahead(self._foreseen(alone, self._first_sizes()[:1]))
        for options in alone:
            self._try(options)
        self._combine(levers, allow=allow)
        fits_unchanged = any(t.choice.fits and not t.choice.changes_numerics for t in self.tried)
        if not allow and not self._as_is.fits and not fits_unchanged:
            self._combine(levers, allow=True)
        return sorted((tried.choice for tried in self.tried), key=_rank)

    def _foreseen(
        self, tried: Iterable[tuple[Option, ...]], sizes: Iterable[int | None]
    ) -> Iterator[Task]:
        """Yield tasks for helpers: sizes of options that will be tried."""
        for options in tried:
            if self._known(options) is not None:
                continue
            try:
                if self._hopeless(options) is None:
                    candidate = self._candidate(self._having(options))
                    for size in sizes:
                        yield from candidate.foreseen(size)
            except WrongLeverError:
                raise
            except AutobatchError:  # it is told when they are tried
                continue

    def _first_sizes(self) -> tuple[int | None, ...]:
        """Return the sizes that a candidate is executed at first; None is that of its search."""
        return (1, None) if self._reference == 1 else (None,)

    def _options(self, lever: Lever) -> Sequence[Option]:
        """Return what a lever offers; one that fails on an odd model is left out, and noted."""
        try:
            return lever.options(self.setup)
        except WrongLeverError:
            raise
        except Exception as error:
            self.notes.append(f"{lever.name} was left out: {said_by(error)}")
            return ()

    def _as_it_is(self) -> Choice:
        """Run the setup as it is, and take its plan's micro-batch as the reference."""
        self._tell("as it is")
        candidate = self._candidate(self.setup)
        plan = candidate.plan() if candidate.fits(1) else None
        if plan is not None:
            self._reference = plan.micro_batch
        return self._choice((), candidate, plan, as_is_bytes=None)

    def _try(self, options: tuple[Option, ...]) -> Choice | None:
        """Return the setup with some options, tried once; None where it fails, or time is up."""
        if (known := self._known(options)) is not None:
            return known
        if self._is_late():
            return None
        try:
            if (hopeless := self._hopeless(options)) is not None:
                if len(options) > 1:
                    return None  # that each of them is hopeless is told already
                self.tried.append(_Tried(hopeless, options))
                return hopeless
            self._tell(_joined(options))
            candidate = self._candidate(self._having(options))
            is_hopeless = self._reference == 1 and not candidate.fits(1)
            plan = None if is_hopeless else candidate.plan()
            as_is_bytes = self._as_is.reference_bytes
            choice = self._choice(options, candidate, plan, as_is_bytes=as_is_bytes)
            self._require_untouched(options)
        except WrongLeverError:
            raise
        except AutobatchError as error:
            self._require_untouched(options)
            self.notes.append(f"{_joined(options)} cannot be had here: {one_line(error)}")
            return None
        self.tried.append(_Tried(choice, options))
        return choice

    def _require_untouched(self, options: tuple[Option, ...]) -> None:
        if self.own is not None:
            self.own.require_untouched(_joined(options))

    def _known(self, options: tuple[Option, ...]) -> Choice | None:
        """Return what was found of options that were tried."""
        labels = tuple(option.label for option in options)
        return next((t.choice for t in self.tried if t.choice.options == labels), None)

    def _having(self, options: tuple[Option, ...]) -> Setup:
        """Return the setup with some options, the same one whenever it is asked for."""
        if not options:
            return self.setup
        labels = tuple(option.label for option in options)
        if labels not in self._setups:
            self._setups[labels] = applied(self._having(options[:-1]), options[-1:])
        return self._setups[labels]

    def _hopeless(self, options: tuple[Option, ...]) -> Choice | None:
        """Return the choice of options that leave too much state as it is; None where they may fit.

        What lasts from update to update was seen with the other ones of the options alone.
        """
        lasting = self._lasting.get(_changing_state(options))
        if lasting is None or lasting <= self._candidate(self.setup).budget_bytes:
            return None
        setup = self._having(options)
        runs_the_same = identity_of(setup.workload) == identity_of(self.setup.workload)
        if runs_the_same and setup.executes_as(self.setup):
            return None  # another allocator replays what was executed
        return Choice(
            **_option_fields(options),
            fits=False,
            reference_bytes=lasting,
            saved_bytes=None,
            ceiling=0,
            micro_batch=0,
            accumulation_steps=0,
            likelihood=None,
            window_seconds=None,
            is_executed=False,
        )

    def _combine(self, levers: Sequence[Lever], *, allow: bool) -> None:
        """Try the best option of each lever together with those of the others that save most."""
        ranked = self._ranked(allow=allow)
        names = [lever.name for lever in levers]
        pairs = [
            _in_order(two, names)
            for two in combinations(ranked[:_PAIRED], 2)
            if two[0].goes_with(two[1])
        ]
        self._grow(ranked, names, pairs)
        run_ahead(self._foreseen(reversed(pairs), self._first_sizes()))
        for options in pairs:
            self._try(options)

    def _ranked(self, *, allow: bool) -> list[Option]:
        """Return of each lever the option that saves most, in the order in which they are added.

        Options that are hopeless on their own follow those that leave less state, beside which
        they save most.
        """
        best: dict[str, _Tried] = {}
        unknown: dict[str, _Tried] = {}
        for tried in self.tried:
            choice, lever = tried.choice, tried.options[0].lever
            if len(tried.options) > 1 or (choice.changes_numerics and not allow):
                continue
            if not self._as_is.fits and not self._having(tried.options).workload.accumulates:
                continue  # what does not fit as it is needs small micro-batches
            least = _saved(best[lever].choice) if lever in best else self._notable_bytes
            if choice.saved_bytes is None:
                unknown.setdefault(lever, tried)
            elif choice.saved_bytes > least:
                best[lever] = tried
        ranked = sorted(best.values(), key=lambda tried: -_saved(tried.choice))
        if ranked and unknown:
            more = [unknown[name] for name in _USUALLY_SAVE_MOST if name in unknown.keys() - best]
            less_state = [tried for tried in ranked if not tried.options[0].keeps_state]
            ranked = [*less_state, *more, *(tried for tried in ranked if tried not in less_state)]
        return [tried.options[0] for tried in ranked]

    def _grow(
        self, ranked: Iterable[Option], names: list[str], pairs: list[tuple[Option, ...]]
    ) -> None:
        """Add one option after the other to those before it, as long as each saves something."""
        had: list[Option] = []
        saved, fitting = 0, 0
        for option in ranked:
            if len(had) == _TOGETHER or fitting == _ENOUGH:
                break
            if not all(map(option.goes_with, had)):
                continue
            options = _in_order((*had, option), names)
            if self._known(options) is None:
                first, *second = self._first_sizes()
                foreseen = self._foreseen([options], second), self._foreseen(pairs, [first])
                run_ahead(chain(*foreseen))
            found = self._try(options)
            if found is not None and _saved(found) >= saved + self._notable_bytes:
                had, saved = [*had, option], _saved(found)
                fitting += found.fits and len(had) > 1

    def _choice(
        self,
        options: tuple[Option, ...],
        candidate: Candidate,
        plan: Plan | None,
        *,
        as_is_bytes: int | None,
    ) -> Choice:
        reserved = candidate.reserved(self._reference)
        if (lasting := candidate.lasting_bytes()) is not None:
            self._lasting.setdefault(_changing_state(options), lasting)
        return Choice(
            **_option_fields(options),
            fits=plan is not None,
            reference_bytes=reserved,
            saved_bytes=0 if as_is_bytes is None else as_is_bytes - reserved,
            ceiling=0 if plan is None else plan.ceiling_at_least,
            is_ceiling=plan is None or plan.ceiling is not None,
            micro_batch=0 if plan is None else plan.micro_batch,
            accumulation_steps=0 if plan is None else plan.accumulation_steps,
            likelihood=None if plan is None else plan.likelihood,
            window_seconds=None if plan is None else candidate.window_seconds(plan),
        )

    def _needs(self, resized: tuple[str, int, Resized] | None) -> Iterator[Need]:
        """Yield what would let the run fit without a lever."""
        needs = Needs(
            setup=self.setup,
            asked=self.asked,
            target=self.target,
            reserved_bytes=self._as_is.reference_bytes,
            lasting_bytes=self._lasting[frozenset()],
            candidate=self._candidate,
            tell=self._tell,
            note=self.notes.append,
        )
        return needs.found(resized)

    @property
    def _notable_bytes(self) -> float:
        """What a lever saves at least that is combined with others."""
        return _NOTABLE * self._as_is.reference_bytes

    def _is_late(self) -> bool:
        return self.seconds is not None and time.perf_counter() - self._started > self.seconds

    def _candidate(self, setup: Setup) -> Candidate:
        return Candidate(setup, self.target, self.headroom, self._runs)

    def _tell(self, what: str) -> None:
        count = len(self.tried)
        self.progress(Progress(step=f"trying {what}", executions=count, expected=count + 1))


def _changing_state(options: Iterable[Option]) -> frozenset[str]:
    """Return the labels of those options that may leave less state than there is."""
    return frozenset(option.label for option in options if not option.keeps_state)


def _in_order(options: Iterable[Option], names: list[str]) -> tuple[Option, ...]:
    """Return options in the order of their levers' names; those of other names come last."""
    order = {name: at for at, name in enumerate(names)}
    return tuple(sorted(options, key=lambda one: order.get(one.lever, len(order))))


def _joined(options: Iterable[Option]) -> str:
    return " + ".join(option.label for option in options)


def _option_fields(options: Sequence[Option]) -> dict[str, Any]:
    """Return the fields of a choice that are those of its options."""
    return {
        "options": tuple(option.label for option in options),
        "what": tuple(option.what for option in options),
        "code": tuple(option.code for option in options),
        "trainer": tuple(option.trainer or "" for option in options),
        "changes_numerics": any(option.changes_numerics for option in options),
    }


def _saved(choice: Choice) -> int:
    """Return what a choice saves; nothing that is known of, where it was not executed."""
    return choice.saved_bytes or 0


def _rank(choice: Choice) -> tuple[Any, ...]:
    """Order what fits before the rest, then by time, ceiling and memory."""
    seconds = math.inf if choice.window_seconds is None else choice.window_seconds
    return (
        not choice.fits,
        not choice.is_executed,
        seconds,
        -choice.ceiling,
        choice.reference_bytes,
        choice.label,
    )
