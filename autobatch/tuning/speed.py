"""How long a training window is estimated to take on a simulated GPU, at any size.

The window runs once on the simulated card with its work counted; a roofline makes seconds of that
(`gpus/roofline.py`). Every figure from here is an estimate; `reports/throughput` says how far off.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from autobatch.devices.base import MOST_STEPS, Run
from autobatch.devices.virtual.gpu import VirtualGpu
from autobatch.gpus.catalogue import GpuSpec
from autobatch.gpus.roofline import SpeedEstimate, can_estimate, estimate
from autobatch.gpus.work import LinearWork, WindowWork, Work
from autobatch.memory.allocator_settings import AllocatorSettings
from autobatch.workload.workload import Workload

__all__ = ["SpeedModel"]

_SIZES = (2, 3)
"""Micro-batches that are counted; at one, PyTorch leaves out copies that it makes at all others."""


@dataclass(slots=True)
class SpeedModel:
    """The estimated seconds of windows of one workload on one card, at any size.

    One that is made by `of` counts the window at two small micro-batches. FLOPs and bytes lie on
    straight lines through them, so that other sizes cost about a millisecond each. Where there are
    no such lines, or the windows of the two sizes are not the same calls, every size that is asked
    for is counted, once. A compiled model is estimated as its eager original, which takes longer.

    Attributes:
        workload: what is trained.
        gpu: the card.
    """

    workload: Workload
    gpu: GpuSpec
    _settings: AllocatorSettings | None = None
    _lines: _Lines | None = None
    _counts: dict[int, WindowWork | None] = field(default_factory=dict)

    @classmethod
    def of(cls, workload: Workload, gpu: GpuSpec) -> SpeedModel:
        """Count a workload's windows at two sizes.

        Raises:
            WorkloadError: the user's model, loss or optimizer failed.
        """
        model = cls(workload, gpu)
        if can_estimate(gpu):
            limit = workload.sample_limit
            low, high = _SIZES if limit is None or limit >= max(_SIZES) else (1, 2)
            if limit is None or limit >= high:
                first, second = model._work(low), model._work(high)
                if first is not None and second is not None:
                    model._lines = _Lines.through(first, second)
        return model

    @classmethod
    def of_runs(
        cls,
        workload: Workload,
        gpu: GpuSpec,
        runs: Mapping[int, Run],
        settings: AllocatorSettings | None = None,
    ) -> SpeedModel:
        """Take windows of two micro-batches that ran with their work counted, by micro-batch.

        Other sizes are counted where these do not tell.
        """
        model = cls(workload, gpu, settings)
        model._counts |= {n: run.work for n, run in runs.items() if run.work}
        works = [(n, run.work) for n, run in sorted(runs.items()) if n >= min(_SIZES) and run.work]
        if len(works) > 1:
            (_, first), (_, second) = works[:2]
            model._lines = _Lines.through(first, second)
        return model

    def estimate(self, micro_batch: int, accumulation_steps: int) -> SpeedEstimate | None:
        """Return the estimate of a window; None where the card's speed is not known.

        Raises:
            WorkloadError: the size had to be counted, and the user's model, loss or optimizer
                failed.

        >>> import torch
        >>> from autobatch.gpus.catalogue import find_gpu
        >>> workload = Workload(
        ...     model=torch.nn.Linear(512, 512), batch=lambda n: torch.zeros(n, 512)
        ... )
        >>> window = SpeedModel(workload, find_gpu("t4")).estimate(8, 2)
        >>> window.bound, window.samples, window.low < window.seconds < window.high
        ('launch', 16, True)
        """
        if not can_estimate(self.gpu):
            return None
        lines = self._lines
        work = self._work(micro_batch) if lines is None else lines.at(micro_batch)
        if work is None:
            return None
        return estimate(
            work,
            self.gpu,
            accumulation_steps=accumulation_steps,
            world_size=self.workload.world_size,
        )

    def seconds(self, micro_batch: int, accumulation_steps: int) -> float | None:
        """Return the estimated seconds of a window; None where the card's speed is not known.

        >>> import torch
        >>> from autobatch.gpus.catalogue import find_gpu
        >>> workload = Workload(
        ...     model=torch.nn.Linear(512, 512), batch=lambda n: torch.zeros(n, 512)
        ... )
        >>> model = SpeedModel.of(workload, find_gpu("t4"))
        >>> model.seconds(4096, 1) < model.seconds(4096, 2) < model.seconds(8192, 2)
        True
        """
        found = self.estimate(micro_batch, accumulation_steps)
        return None if found is None else found.seconds

    def _work(self, micro_batch: int) -> WindowWork | None:
        if micro_batch not in self._counts:
            run = VirtualGpu(self.gpu, self._settings, counts_work=True).run(
                self.workload,
                micro_batch=micro_batch,
                accumulation_steps=MOST_STEPS if self.workload.accumulates else 1,
            )
            self._counts[micro_batch] = run.work
        return self._counts[micro_batch]


@dataclass(frozen=True, slots=True)
class _Lines:
    """A window at any micro-batch: its parts on straight lines."""

    forward: LinearWork
    backward: LinearWork
    later_forward: LinearWork | None
    later_backward: LinearWork | None
    second: WindowWork

    @classmethod
    def through(cls, first: WindowWork, second: WindowWork) -> _Lines | None:
        """Lay two windows side by side; None where they are not the same calls."""

        def line(one: Work, other: Work) -> LinearWork:
            return LinearWork.of((first.samples, one), (second.samples, other))

        def later(one: Work | None, other: Work | None) -> LinearWork | None:
            if one is None and other is None:  # windows of one micro-batch
                return None
            return line(one or Work(), other or Work())

        try:
            return cls(
                line(first.forward, second.forward),
                line(first.backward, second.backward),
                later(first.later_forward, second.later_forward),
                later(first.later_backward, second.later_backward),
                second,
            )
        except ValueError:
            return None

    def at(self, micro_batch: int) -> WindowWork:
        """Return the window at a micro-batch; its update is the same at all of them."""
        forward, backward = self.later_forward, self.later_backward
        return WindowWork(
            samples=micro_batch,
            forward=self.forward.at(micro_batch),
            backward=self.backward.at(micro_batch),
            later_forward=None if forward is None else forward.at(micro_batch),
            later_backward=None if backward is None else backward.at(micro_batch),
            update=self.second.update,
            averages=self.second.averages,
        )
