"""What a workload of this report is, and the list of all of them.

Invariant: a package is imported by the function that makes a step of it, never with the module, so
that the list is known where no package is installed.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from autobatch.plan.plan import Plan
from autobatch.tuning.tuner import tune

GPU = "a100-40gb"


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What a user hands to autobatch, and what the checks have to know.

    Attributes:
        plan: gets the plan.
        model: whose parameters and buffers the plan has to account for.
        on_cpu: micro-batches that run on the CPU for comparison; or why none can.
        state: optimizer state in bytes per byte of trained parameters; None counts that of a step
            on the CPU, which a text says cannot be.
        learned: parameters outside of the model that are trained with it.
        bounded: whether shapes depend on values, so that the plan takes their upper bound.
    """

    plan: Callable[[], Plan]
    model: Any
    on_cpu: tuple[int, ...] | str = (2, 4)
    state: float | str | None = None
    learned: Sequence[Any] = ()
    bounded: bool = False


def step(
    model: Any,
    *,
    target: int,
    gpu: str = GPU,
    on_cpu: tuple[int, ...] | str = (2, 4),
    state: float | str | None = None,
    learned: Sequence[Any] = (),
    bounded: bool = False,
    **options: Any,
) -> Step:
    """Return the step of one call of `autobatch.tune`, whose other arguments are `options`."""
    return Step(
        plan=lambda: tune(model, target=target, gpu=gpu, **options),
        model=getattr(model, "model", model) if hasattr(model, "batch") else model,
        on_cpu=on_cpu,
        state=state,
        learned=learned,
        bounded=bounded,
    )


@dataclass(frozen=True, slots=True)
class Entry:
    """A workload.

    Attributes:
        packages: distributions that it needs beside autobatch and PyTorch.
        make: builds it.
    """

    name: str
    area: str
    packages: tuple[str, ...]
    make: Callable[[], Step] = field(compare=False)

    @property
    def what(self) -> str:
        """The first line that its function says of itself."""
        return (self.make.__doc__ or "").strip().partition("\n")[0].rstrip(".")


_ENTRIES: dict[str, Entry] = {}


def workload(*packages: str) -> Callable[[Callable[[], Step]], Callable[[], Step]]:
    """Enter a function that makes a step, under its name and the area that its module is."""

    def enter(make: Callable[[], Step]) -> Callable[[], Step]:
        area = make.__module__.rpartition(".")[2]
        name = make.__name__
        assert name not in _ENTRIES, f"two workloads are called {name}"
        _ENTRIES[name] = Entry(name, area, packages, make)
        return make

    return enter


def entries() -> Mapping[str, Entry]:
    """Return every workload by name."""
    for module in pkgutil.iter_modules([str(Path(__file__).parent / "workloads")]):
        importlib.import_module(f"reports.zoo.workloads.{module.name}")
    return dict(sorted(_ENTRIES.items(), key=lambda item: (item[1].area, item[0])))


def selected(known: Mapping[str, Entry], match: str | None) -> list[Entry]:
    """Return the workloads whose name or area, or a package of which, matches a glob."""
    return [
        entry
        for entry in known.values()
        if match is None
        or any(fnmatchcase(word, match) for word in (entry.name, entry.area, *entry.packages))
    ]
