"""What is trained and on which card: what levers change."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from autobatch.gpus.catalogue import GpuSpec
from autobatch.levers.code import OptimizerCode
from autobatch.memory.allocator_settings import AllocatorSettings
from autobatch.support.products import are_in_tf32, products_in_tf32
from autobatch.workload.workload import Change, Workload
from autobatch.workload.wrappers import unwrapped

__all__ = ["Setup"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """A workload, the simulated card that it runs on, and its allocator.

    Attributes:
        workload: what is trained; its model stays as it is, changes are made to copies.
        gpu: the card that is simulated.
        settings: of the caching allocator.
        tf32: whether float32 matrix products run in TF32; at first as this process has it.
        kernels: those of attention, by priority; none leaves them as this process has them.
    """

    workload: Workload
    gpu: GpuSpec
    settings: AllocatorSettings = field(default_factory=AllocatorSettings.of_environment)
    tf32: bool = field(default_factory=are_in_tf32)
    kernels: tuple[SDPBackend, ...] = ()

    @property
    def model(self) -> nn.Module:
        """The user's module, below wrappers of compilers and data parallelism; only to look at."""
        return unwrapped(self.workload.model)

    def has(self, lever: str) -> bool:
        """Return whether a lever has changed the model already.

        >>> from autobatch.gpus.catalogue import find_gpu
        >>> plain = Setup(workload=Workload(model=nn.Linear(1, 1), batch=list), gpu=find_gpu("t4"))
        >>> plain.has("lora")
        False
        """
        return any(getattr(change, "lever", None) == lever for change in self.workload.changes)

    def having(self, **changes: Any) -> Setup:
        """Return a setup whose workload has other attributes.

        >>> from autobatch.gpus.catalogue import find_gpu
        >>> plain = Setup(workload=Workload(model=nn.Linear(1, 1), batch=list), gpu=find_gpu("t4"))
        >>> plain.having(autocast="fp16").workload.autocast
        'fp16'
        """
        return replace(self, workload=replace(self.workload, **changes))

    def with_optimizer(self, code: str) -> Setup:
        """Return a setup whose optimizer is the one that lines of code make of its own."""
        return self.having(optimizer=OptimizerCode(code, self.workload.optimizer))

    def changed(self, change: Change) -> Setup:
        """Return a setup whose copied model goes through one more change, its last one."""
        return self.having(changes=(*self.workload.changes, change))

    def changed_below(self, wrapping: str, change: Change) -> Setup:
        """Return a setup that goes through one more change, before that of a lever that wraps."""
        had = self.workload.changes
        at = next((i for i, one in enumerate(had) if getattr(one, "lever", None) == wrapping), None)
        before, after = (had, ()) if at is None else (had[:at], had[at:])
        return self.having(changes=(*before, change, *after))

    def with_batches(self, wrap: Callable[[Any], Any]) -> Setup:
        """Return a setup whose makers of batches are in wrappers."""
        workload = self.workload
        return self.having(
            batch=wrap(workload.batch), stream=tuple(wrap(one) for one in workload.stream)
        )

    def executes_as(self, other: Setup) -> bool:
        """Return whether one workload would run the same kernels in both setups, on one card.

        >>> from autobatch.gpus.catalogue import find_gpu
        >>> plain = Setup(workload=Workload(model=nn.Linear(1, 1), batch=list), gpu=find_gpu("t4"))
        >>> plain.executes_as(replace(plain, tf32=not plain.tf32))
        False
        """
        return (self.tf32, self.kernels) == (other.tf32, other.kernels)

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """Let float32 products and attention be as this setup has them: settings of the process."""
        with ExitStack() as settings:
            settings.enter_context(products_in_tf32(self.tf32))
            if self.kernels:
                settings.enter_context(sdpa_kernel(list(self.kernels), set_priority=True))
            yield
