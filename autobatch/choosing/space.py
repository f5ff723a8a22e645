"""What a sweep chooses from: settings of levers, levers of the user's own, and micro-batches.

Invariant: a configuration is decided by its parameters alone, so that every worker that reads them
from a study builds the same one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from autobatch.errors import AutobatchError, LeverError, UsageError, WorkloadError
from autobatch.levers.known import LEVERS, levers_named
from autobatch.levers.lever import Lever, Option, WrongLeverError
from autobatch.levers.own import OwnLevers
from autobatch.levers.setup import Setup
from autobatch.records.applied import AppliedLever
from autobatch.records.split import Split, split
from autobatch.support.wording import count, one_line
from autobatch.workload.identity import identity_of

__all__ = ["AS_IT_IS", "MICRO_BATCH", "Configuration", "OwnLever", "Space", "planned_sizes"]

OwnLever = Callable[[Any], Callable[[Setup], Setup]]
"""Takes an Optuna trial, asks it for values, and returns what changes a setup by them."""

AS_IT_IS = "as it is"
MICRO_BATCH = "micro-batch"

_MOST_SIZES = 24


@dataclass(frozen=True, slots=True, kw_only=True)
class Configuration:
    """One configuration, ready to run.

    Attributes:
        setup: with all that is changed.
        split: of the target into micro-batches.
        settings: by parameter, as text; without the micro-batch.
        options: of the levers that change something, in the order in which they were applied.
        failure: what a lever of the user's own raised, so that this cannot run; None if nothing.
    """

    setup: Setup
    split: Split
    settings: Mapping[str, str]
    options: tuple[Option, ...]
    failure: str | None = None

    @property
    def micro_batch(self) -> int:
        """Samples in one forward/backward on one GPU."""
        return self.split.micro_batch

    @property
    def combination(self) -> tuple[tuple[str, str], ...]:
        """What is the same for all micro-batches, in an order that storages do not decide."""
        return tuple(sorted(self.settings.items()))

    @property
    def changes_numerics(self) -> bool:
        """Whether training computes something else than as it is."""
        return any(option.changes_numerics for option in self.options)


class Space:
    """Settings of levers times micro-batches, for one training run."""

    def __init__(
        self,
        setup: Setup,
        target: int,
        levers: Iterable[str | Lever | OwnLever] | None,
        *,
        allow_numerics: bool,
        keeps_settings: bool,
        limit: int | None = None,
    ) -> None:
        """Look at what each lever offers; nothing runs.

        Args:
            setup: the training run as it is.
            target: effective batch: samples per update over all GPUs.
            levers: names, levers, and functions that take the trial; None is all levers whose
                settings keep the numbers.
            allow_numerics: also take settings that change numbers where no lever is named.
            keeps_settings: leave out what changes the allocator, as a process that runs must.
            limit: largest micro-batch to consider; None is the Workload's own.

        Raises:
            UsageError: there is no lever of a name, or one of them is none.
            WorkloadError: a lever of the user's own raised an error.
        """
        given = None if levers is None else _given(levers)
        known = [each for each in given or () if isinstance(each, (str, Lever))]
        self._setup = setup
        self._target = target
        self._calls = OwnLevers(setup)
        self._own = [each for each in given or () if not isinstance(each, (str, Lever))]
        self._levers = list(LEVERS.values()) if given is None else levers_named(known)
        of_yours = {f"lever {each.name}": each for each in self._levers if not _is_known(each)}
        for own in self._own:
            function = _function_of(own)
            name = f"{function.__module__}.{function.__qualname__}"
            at = sum(each.split(" ")[0] == name for each in of_yours)
            of_yours[f"{name} {at + 1}" if at else name] = own
        self._identity = identity_of(of_yours)  # before they run, which may change what they hold
        self._levers = self._calls.checked(self._levers)
        allow_numerics = allow_numerics or given is not None
        self._values: dict[str, list[str]] = {}
        for lever in self._levers:
            values = [
                option.value
                for option in lever.options(setup)
                if (allow_numerics or not option.changes_numerics)
                and not (keeps_settings and _changes_settings(option, setup))
            ]
            if values:
                self._values[lever.name] = [AS_IT_IS, *values]
        self.sizes = planned_sizes(target, setup.workload.world_size, limit)

    @property
    def described(self) -> dict[str, Any]:
        """The space in plain values, which decide what a study is about."""
        return {
            "levers": self._values,
            "own levers": self._identity,
            "micro-batches": list(self.sizes),
        }

    def suggest(self, trial: Any) -> None:
        """Ask a trial for the value of every parameter."""
        self.suggest_settings(trial)
        self.suggest_size(trial)

    def suggest_settings(self, trial: Any) -> None:
        """Ask a trial for the value of every parameter but the micro-batch."""
        for name, values in self._values.items():
            trial.suggest_categorical(name, values)
        for own in self._own:
            self._change_of(own, trial)

    def suggest_size(self, trial: Any) -> int:
        """Ask a trial for the micro-batch."""
        return int(trial.suggest_categorical(MICRO_BATCH, list(self.sizes)))

    @property
    def settings(self) -> Mapping[str, Sequence[str]]:
        """The settings of every lever by its name, but of the user's own."""
        return self._values

    @property
    def has_own(self) -> bool:
        """Whether there are levers of the user's own."""
        return bool(self._own)

    def require_untouched(self, label: str) -> None:
        """Check what is trained after a run of a configuration.

        Raises:
            WrongLeverError: what a lever of the user's own did to a copy changed it as well.
        """
        self._calls.require_untouched(label)

    def is_as_it_is(self, configuration: Configuration) -> bool:
        """Whether no lever of a configuration changes anything."""
        return configuration.setup is self._setup and configuration.failure is None

    def configuration(self, trial: Any) -> Configuration | str:
        """Return the configuration of a trial that has all values; or why there is none.

        Args:
            trial: anything that answers `suggest_categorical` and its like, and has `params` once
                it was asked.

        Raises:
            UsageError: a lever of the user's own returned something else than it must, or changed
                what is trained in place.
            WorkloadError: one that takes the trial raised an error before it returned a function.
        """
        setup = self._setup
        options: list[Option] = []
        failure: str | None = None
        by_name = {lever.name: lever for lever in self._levers}
        for name, values in self._values.items():
            value = trial.suggest_categorical(name, values)
            if value == AS_IT_IS:
                continue
            try:
                offered = {option.value: option for option in by_name[name].options(setup)}
                if value not in offered:
                    return f"{name}: {value} cannot be had with the levers before it"
                for other in options:
                    if not offered[value].goes_with(other):
                        return f"{other.label} and {name}: {value} cannot be combined"
                setup = offered[value].applied_to(setup)
            except WrongLeverError:
                raise
            except AutobatchError as error:
                if _is_failure(error):
                    failure = failure or one_line(error)
                    continue
                return f"{name}: {value}: {one_line(error)}"
            options.append(offered[value])
        for own in self._own:
            change = self._change_of(own, trial)
            try:
                setup = self._applied(own, change, setup)
            except WrongLeverError:
                raise
            except AutobatchError as error:
                if isinstance(error, LeverError):
                    return f"{_name_of(own)}: {one_line(error)}"
                failure = failure or one_line(error)
        size = self.suggest_size(trial)
        settings = {name: str(v) for name, v in trial.params.items() if name != MICRO_BATCH}
        try:
            divided = split(self._target, ceiling=size, world_size=setup.workload.world_size)
        except UsageError as error:
            return str(error)
        if divided.micro_batch != size:
            return (
                f"no update of {count(self._target, 'sample')} has micro-batch {size} on these GPUs"
            )
        if not setup.workload.accumulates and divided.accumulation_steps > 1:
            return (
                "the optimizer steps in the backward pass, so that all samples of an update are "
                f"one micro-batch, and not {divided.accumulation_steps:,} of {size:,}"
            )
        return Configuration(
            setup=setup,
            split=divided,
            settings=settings,
            options=tuple(options),
            failure=failure,
        )

    def _change_of(self, own: OwnLever, trial: Any) -> Callable[[Setup], Setup]:
        with self._calls.running(_name_of(own)):
            change: Any = own(trial)
        if not callable(change):
            raise UsageError(
                f"the lever {_name_of(own)} returned a {type(change).__name__}: it must return a "
                "function that takes a Setup and returns another one"
            )
        return change  # type: ignore[no-any-return]

    def _applied(self, own: OwnLever, change: Callable[[Setup], Setup], setup: Setup) -> Setup:
        name = _name_of(own)
        changed = self._calls.applied(name, change, setup)
        if changed is setup:
            return setup
        code = f"# do here what {name} did to the Setup"
        had = AppliedLever(lever=name, value="of yours", code=code)
        return changed.having(levers=(*changed.workload.levers, had))


def planned_sizes(target: int, world_size: int, limit: int | None = None) -> tuple[int, ...]:
    """Return the micro-batches that a plan for a target could have, the largest first.

    Where a target has many, as primes do, sizes that are close to a larger one are left out.

    >>> planned_sizes(96, 1)
    (96, 48, 32, 24, 16, 12, 8, 6, 4, 3, 2, 1)
    >>> planned_sizes(256, 4, limit=20)
    (16, 8, 4, 2, 1)
    """
    ceiling = -(-target // world_size)
    ceiling = ceiling if limit is None else min(ceiling, limit)
    sizes: list[int] = []
    while ceiling:
        try:
            size = split(target, ceiling=ceiling, world_size=world_size).micro_batch
        except UsageError:  # so many steps that nobody wants them
            if not sizes:
                raise
            break
        sizes.append(size)
        ceiling = size - 1
    ratio = 1.0
    thinned = sizes
    while len(thinned) > _MOST_SIZES:
        ratio += 0.05
        thinned = sizes[:1]
        for size in sizes[1:]:
            if size * ratio <= thinned[-1] or size == sizes[-1]:
                thinned.append(size)
    return tuple(thinned)


def _given(levers: Any) -> list[Any]:
    """Return what was given as levers, as a list: one of them counts as several.

    Raises:
        UsageError: something in it is none.
    """
    is_one = isinstance(levers, (str, Lever)) or callable(levers)  # a name is no list of letters
    given = list(levers) if isinstance(levers, Iterable) and not is_one else [levers]
    for each in given:
        if not isinstance(each, (str, Lever)) and not callable(each):
            raise UsageError(
                f"levers holds a {type(each).__name__}: use names, such as {', '.join(LEVERS)}, or "
                "functions that take the Optuna trial"
            )
    return given


def _changes_settings(option: Option, setup: Setup) -> bool:
    """Return whether an option changes the allocator; not where it cannot be had at all."""
    try:
        return option.apply(setup).settings != setup.settings
    except WrongLeverError:
        raise
    except AutobatchError:  # told of the configurations that have it
        return False


def _is_known(lever: Lever) -> bool:
    return LEVERS.get(lever.name) is lever


def _is_failure(error: AutobatchError) -> bool:
    """Return whether a lever raised what it did not mean to, rather than refuse a setup."""
    return isinstance(error, WorkloadError) and not isinstance(error, LeverError)


def _name_of(own: OwnLever) -> str:
    return str(_function_of(own).__name__)


def _function_of(own: OwnLever) -> Any:
    """Return the function that a lever is, or its class where it is an object that is called."""
    function = own.func if isinstance(own, partial) else own
    return function if hasattr(function, "__qualname__") else type(function)
