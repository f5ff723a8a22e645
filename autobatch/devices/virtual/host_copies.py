"""What a training loop does through the host: copies that it waits for, and ops on what they gave.

What comes off the card is copied by the training itself, and so is what goes back: activations that
`save_on_cpu` keeps, shares of FSDP2 and optimizers on the host, a `.cpu()` of the user's. What the
host makes for the card alone, such as a batch, is copied by a loader, ahead of time.

Invariant: where nothing comes off the card, and the setup puts nothing on the host, there is none.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from autobatch.devices.virtual.kernels.costs import traits_of
from autobatch.devices.virtual.recorder import StorageRecorder
from autobatch.gpus.work import Communication, HostTraffic
from autobatch.support.torch_private import FakeTensor, OpOverload

__all__ = ["HostCopies"]


class HostCopies:
    """Follows the memory of the host that holds what the card gave, or what the setup put there."""

    def __init__(self, recorder: StorageRecorder, device: torch.device):
        """Follow what ops do to the host.

        Args:
            recorder: tells the phase, and the stream that a copy runs on.
            device: the simulated one.
        """
        self._recorder = recorder
        self._device = device
        self._off_card: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()
        self._of_setup: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def followed(
        self, func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any
    ) -> list[Communication]:
        """Return what an op does between card and host, and on the host with what the card gave."""
        given, made = list(_fakes((args, kwargs))), list(_fakes(output))
        on_host = [tensor for tensor in (*given, *made) if not self._is_here(tensor)]
        if not on_host:
            return []
        traits = traits_of(func)
        named = {**dict(zip(traits.names, args, strict=False)), **kwargs}
        written = list(_fakes([named[name] for name in traits.written if name in named]))
        is_off_card = any(map(self._is_off_card, given))
        copies = [
            self._traffic("to_host" if self._is_here(source) else "from_host", [target])
            for source, target in _pairs(func, args, output)
            if self._is_here(source) != self._is_here(target)
            and (self._is_off_card(source) or _is_in(source, self._of_setup))
        ]
        for marks, holds in (
            (self._off_card, is_off_card),
            (self._of_setup, self._recorder.phase == "setup"),
        ):
            if holds:
                marks.update(_storages(one for one in (*made, *written) if not self._is_here(one)))
        if is_off_card and not traits.is_free and len(on_host) == len(given) + len(made):
            return [self._traffic("in_host", [*given, *(made if traits.makes_new else written)])]
        return copies

    def _traffic(self, what: HostTraffic, tensors: Sequence[Tensor]) -> Communication:
        """Return a copy of what is written, as the card converts, or an op on its tensors."""
        return Communication(
            collective=what,
            bytes=float(sum(tensor.numel() * tensor.element_size() for tensor in tensors)),
            ranks=1,
            overlaps=what != "in_host" and self._recorder.stream() != 0,
        )

    def _is_off_card(self, tensor: FakeTensor) -> bool:
        return self._is_here(tensor) or _is_in(tensor, self._off_card)

    def _is_here(self, tensor: FakeTensor) -> bool:
        return bool(tensor.fake_device == self._device)


def _is_in(tensor: Tensor, marks: weakref.WeakSet[torch.UntypedStorage]) -> bool:
    return any(storage in marks for storage in _storages([tensor]))


def _storages(tensors: Iterable[Tensor]) -> Iterator[torch.UntypedStorage]:
    return (one.untyped_storage() for one in tensors if one.layout is torch.strided)


def _fakes(value: Any) -> Iterator[FakeTensor]:
    """Yield the fake tensors of a value: of DTensors, their local parts."""
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _fakes(item)
    elif isinstance(value, Mapping):
        yield from _fakes(list(value.values()))
    else:
        value = getattr(value, "_local_tensor", value)
        if isinstance(value, FakeTensor):
            yield value


def _pairs(
    func: OpOverload, args: Sequence[Any], output: Any
) -> Iterator[tuple[FakeTensor, FakeTensor]]:
    """Yield what an op copies from, and where to; nothing for ops that copy nothing."""
    if func._opname == "_to_copy":
        sources, targets = _fakes(args[0]), _fakes(output)
    elif func._opname in ("copy_", "_foreach_copy_"):
        sources, targets = _fakes(args[1]), _fakes(args[0])
    else:
        return
    yield from zip(sources, targets, strict=False)
