"""Ranks that hold a shard of each parameter, by FSDP2."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor

from autobatch.accumulate.agreement import Group
from autobatch.errors import UsageError
from autobatch.support.torch_private import drop_unreduced, shard_groups

__all__ = ["Shards"]


class Shards(Group):
    """FSDP2: gradients are reduced to the ranks' shards in the last micro-batch, or in each.

    Without reduction every rank keeps whole gradients between micro-batches
    (`FSDPModule.set_requires_gradient_sync`), outside of `.grad`.
    """

    # FSDP2 all-gathers parameters in every forward pass, so all ranks must run the same number of
    # micro-batches, and none can recover or skip alone.
    alike = True
    recovers = False
    skips = False

    def __init__(self, modules: list[Any], group: dist.ProcessGroup | None, *, each: bool) -> None:
        super().__init__(group)
        self._modules = modules
        self._groups = [group for m in modules for group in shard_groups(m)]
        self._each = each
        self.shows_gradients = each

    def begin_micro_batch(self, last: bool) -> None:
        """See `Ranks.begin_micro_batch`."""
        self._set(self.averages(last))

    def end_micro_batch(self) -> None:
        """See `Ranks.end_micro_batch`."""
        self._set(True)

    def begin_window(self, trained: list[Tensor]) -> None:
        """See `Ranks.begin_window`."""
        for group in self._groups:
            if group.gradient_divide_factor is not None:
                raise UsageError(
                    "set_gradient_divide_factor changes by what FSDP2 divides gradients, which a "
                    "window relies on: leave it as it is"
                )
            # what a window that was left, or a backward pass of the user's, did not reduce
            drop_unreduced(group)

    def before_average(self) -> None:
        """See `Ranks.before_average`."""
        self._set(True)
        for module in self._modules:
            module.set_is_last_backward(True)

    def averages(self, last: bool) -> bool:
        """See `Ranks.averages`."""
        return last or self._each

    def _set(self, reduces: bool) -> None:
        for module in self._modules:
            module.set_requires_gradient_sync(reduces, recurse=False)

    def give_up(self, error: BaseException, *, in_pass: bool) -> None:
        """See `Ranks.give_up`."""
        # the others wait in the all-gathers of layers, which no rank can complete without them
        if not in_pass:
            super().give_up(error, in_pass=False)
