"""The user's own state, kept in host memory while its place on the GPU is needed.

Storages are emptied and filled again in place, so that every tensor, view and alias on them stays
the object that it was. Invariant: after `restore`, every byte is as it was before `offload`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autobatch.devices.copies import blank
from autobatch.errors import AutobatchError, WorkloadError
from autobatch.support.host_memory import free_host_bytes
from autobatch.support.units import format_bytes

__all__ = ["HostOffload", "put_back_what_waits"]

_waiting: list[HostOffload] = []
"""What could not go back: its bytes are nowhere else, so that it is kept until it can."""


def put_back_what_waits() -> None:
    """Put back what earlier probes had to leave in host memory.

    Raises:
        AutobatchError: the GPU still has no room for it.
    """
    for offload in _waiting:  # each leaves the list as it goes
        offload.restore()


class HostOffload:
    """Host copies of storages that were on a GPU."""

    def __init__(self, device: torch.device):
        """Offload from `device`."""
        self._device = device
        self._included: dict[int, torch.UntypedStorage] = {}
        self._kept: dict[int, tuple[torch.UntypedStorage, Tensor]] = {}

    @property
    def bytes_held(self) -> int:
        """Bytes that are kept in host memory."""
        return sum(host.nbytes for _, host in self._kept.values())

    def include(self, tensor: Tensor, device: torch.device) -> Tensor:
        """Include a tensor and its gradient in what `offload` moves; return a meta tensor like it.

        Has the signature of `Copier`'s `make`: what a copier reaches is what has to make room.
        """
        for part in (tensor, tensor.grad if tensor.is_leaf else None):
            if part is not None and part.device == self._device:
                storage = part.untyped_storage()
                if storage.nbytes() and storage.resizable():
                    self._included[storage._cdata] = storage
        return blank(tensor, torch.device("meta"))

    def offload(self) -> None:
        """Move all that is included to the host, and free its memory on the GPU.

        Raises:
            WorkloadError: the host has not enough memory for it.
        """
        needed = sum(storage.nbytes() for storage in self._included.values())
        free = free_host_bytes()
        if free is not None and needed > free:
            raise WorkloadError(
                f"the model, its gradients and the optimizer's state take {format_bytes(needed)} "
                f"on the GPU and would have to wait in host memory, where {format_bytes(free)} "
                "are free: tune before moving them to the GPU, or on the command line"
            )
        for key, storage in self._included.items():
            host = torch.empty(storage.nbytes(), dtype=torch.uint8)
            host.copy_(self._bytes(storage))
            self._kept[key] = (storage, host)
            storage.resize_(0)
        self._included.clear()

    def copy_of(self, tensor: Tensor, device: torch.device) -> Tensor:
        """Make a tensor of the same layout and values on a device.

        A tensor on `meta` has no values; its copy has random ones. Has the signature of `Copier`'s
        `make`.
        """
        with torch.no_grad():
            if tensor.is_meta:
                made = blank(tensor, device)
                # small and positive: a variance, a probability and a weight can all be that
                return made.uniform_(0, 0.04) if made.is_floating_point() else made.zero_()
            source = self._readable(tensor.detach())
            if 0 in source.stride():  # expanded: its layout cannot be written to
                return source.contiguous().to(device, copy=True)
            return blank(source, device).copy_(source)

    def _readable(self, tensor: Tensor) -> Tensor:
        kept = self._kept.get(tensor.untyped_storage()._cdata)
        if kept is None:
            return tensor
        host = torch.empty(0, dtype=tensor.dtype)
        offset, size, stride = tensor.storage_offset(), tensor.size(), tensor.stride()
        return host.set_(kept[1].untyped_storage(), offset, size, stride)

    def restore(self) -> None:
        """Put everything back where it was.

        Raises:
            AutobatchError: the GPU no longer has room. What could not go back stays on the host;
                another call, or `put_back_what_waits`, goes on from there.
        """
        if self in _waiting:
            _waiting.remove(self)
        for key, (storage, host) in list(self._kept.items()):
            try:
                storage.resize_(host.nbytes)
            except torch.OutOfMemoryError as error:
                _waiting.append(self)
                raise AutobatchError(
                    f"{format_bytes(self.bytes_held)} of the model's own state wait in host memory "
                    f"and cannot return to the GPU, because something else has taken their place "
                    f"({error}); free memory there and probe again, which puts them back first"
                ) from None
            self._bytes(storage).copy_(host)
            del self._kept[key]

    def _bytes(self, storage: torch.UntypedStorage) -> Tensor:
        return torch.empty(0, dtype=torch.uint8, device=self._device).set_(storage)
