"""What is trained and on which card: what levers change."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from autobatch.gpus.catalogue import GpuSpec
from autobatch.memory.allocator_settings import AllocatorSettings
from autobatch.workload.workload import Change, Workload

__all__ = ["Setup"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """A workload, the simulated card that it runs on, and its allocator.

    Attributes:
        workload: what is trained; its model stays as it is, changes are made to copies.
        gpu: the card that is simulated.
        settings: of the caching allocator.
    """

    workload: Workload
    gpu: GpuSpec
    settings: AllocatorSettings = field(default_factory=AllocatorSettings.of_environment)

    def having(self, **changes: Any) -> Setup:
        """Return a setup whose workload has other attributes.

        >>> from torch import nn
        >>> from autobatch.gpus.catalogue import find_gpu
        >>> plain = Setup(workload=Workload(model=nn.Linear(1, 1), batch=list), gpu=find_gpu("t4"))
        >>> plain.having(autocast="fp16").workload.autocast
        'fp16'
        """
        return replace(self, workload=replace(self.workload, **changes))

    def changed(self, change: Change) -> Setup:
        """Return a setup whose copied model goes through one more change."""
        return self.having(changes=(*self.workload.changes, change))
