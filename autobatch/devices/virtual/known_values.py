"""KnownValues that tensors without memory do have: small whole numbers, and what follows from them.

Models read sizes back from the GPU: the grid of patches of every image, the lengths of sequences,
the shapes of feature maps. Those are numbers of the user's code, of small integer buffers and of
small integer tensors in the sample, and ops on them are run for real, on the CPU.

A fake storage has a *mirror*, a real storage of the same bytes. Views share it, ops that write
change it, and one that writes what is unknown ends it.

Invariant: a mirror holds what the device's memory would hold, or there is none.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from autobatch.devices.copies import blank
from autobatch.support.torch_private import FakeTensor, no_dispatch

__all__ = ["KnownValues", "forget", "mirror", "values_of"]

GIVEN_ELEMENTS = 64
"""Whole numbers of one sample that are known, as sizes are; token ids are more, and are not."""

KEPT_ELEMENTS = 1024
"""Elements, per sample of the micro-batch, up to which a result is known.

By the sample, as what is known at one micro-batch has to be known at any: its results may decide
which ops run.
"""

_MOST_ELEMENTS = 2**22
_WHOLE = frozenset((torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool))
_FLOATS = frozenset((torch.float32, torch.float64))
_UNINITIALISED = frozenset(("empty", "new_empty", "empty_like"))
_MAKERS = _UNINITIALISED | frozenset(
    """
    arange zeros ones full scalar_tensor new_zeros new_ones new_full zeros_like ones_like full_like
    eye tril_indices triu_indices
    """.split()
)
"""Ops that read the value of no tensor."""


class KnownValues:
    """Follows what is known through the ops of one run."""

    def __init__(self, micro_batch: int):
        """Follow a run at this micro-batch."""
        self._most = min(KEPT_ELEMENTS * micro_batch, _MOST_ELEMENTS)

    def lift(self, mode: Any, real: Tensor) -> Any:
        """Make a fake of a tensor that the user's code makes of numbers, with its values."""
        is_plain = type(real) is Tensor and real.layout is torch.strided and not real.is_complex()
        if not is_plain or real.device.type != "cpu" or real.numel() > self._most:
            return NotImplemented
        fake = mode.fake_of(real)
        mirror(fake, real)
        return fake

    def give(self, fake: Tensor, real: Tensor) -> None:
        """Let a tensor of the sample have its values, where it has as few as sizes have.

        One element that is expanded is what stands for a sample on `meta`: it has no values.
        """
        rows = real.shape[0] if real.dim() else 1
        is_few = real.numel() <= min(GIVEN_ELEMENTS * rows, _MOST_ELEMENTS)
        if is_few and (real.numel() == 1 or any(real.stride())):
            _copy_values(fake, real)

    def blank(self, original: Tensor, device: torch.device) -> Tensor:
        """Make memory of a tensor's layout on a device; a small buffer has its values there."""
        made = blank(original, device)
        if original.numel() <= KEPT_ELEMENTS:
            _copy_values(made, original)
        return made

    def result(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Run an op for real, on the CPU; return NotImplemented where a value is unknown."""
        if torch.Tag.nondeterministic_seeded in func.tags or "empty" in func._opname:
            return NotImplemented
        read = _read_out(args, self._most) if _reads_tensors(func) else None
        return NotImplemented if read is None else _run(func, read, kwargs)

    def follow(
        self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any
    ) -> None:
        """Remember what an op that has just run made known, or made unknown."""
        if written := _written(func):
            self._write(func, args, kwargs, written)
        elif isinstance(output, (list, tuple)):
            if any(isinstance(part, Tensor) and self._may_be_known(part) for part in output):
                made = self.result(func, args, kwargs)
                if made is not NotImplemented:
                    for part, real in zip(output, made, strict=True):
                        self._remember(part, real)
        elif isinstance(output, Tensor) and self._may_be_known(output):
            if func._opname in _MAKERS:
                self._remember(output, _made(func, args, kwargs, output))
            else:
                self._remember(output, self.result(func, args, kwargs))

    def _may_be_known(self, output: Tensor) -> bool:
        return (
            (output.dtype in _WHOLE or output.dtype in _FLOATS)
            and output.numel() <= self._most
            and type(output) is FakeTensor
            and "mirror" not in vars(output.untyped_storage())  # a view's is its base's
        )

    def _remember(self, output: Any, real: Any) -> None:
        is_alike = isinstance(real, Tensor) and real.shape == output.shape
        if is_alike and self._may_be_known(output):
            mirror(output, real)

    def _write(
        self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], written: Sequence[Any]
    ) -> None:
        targets: list[Any] = []
        for key in written:
            target = kwargs.get(key) if isinstance(key, str) else args[key]
            targets += target if isinstance(target, (list, tuple)) else (target,)
        targets = [target for target in targets if type(target) is FakeTensor]
        storages = [vars(target.untyped_storage()) for target in targets]
        if not any("mirror" in storage for storage in storages):
            return
        if all("mirror" in storage for storage in storages) and (
            self.result(func, args, kwargs) is not NotImplemented
        ):
            return
        for target in targets:
            forget(target)


def mirror(fake: Tensor, real: Tensor) -> None:
    """Let a tensor without memory have the values of a real one of its shape, on the CPU."""
    storage = fake.untyped_storage()
    with no_dispatch():
        memory = torch.empty(storage.nbytes(), dtype=torch.uint8, device="cpu")
        vars(storage)["mirror"] = memory.untyped_storage()
        _over(memory.untyped_storage(), fake).copy_(real)


def forget(fake: Tensor) -> None:
    """Let a tensor without memory have no values."""
    vars(fake.untyped_storage()).pop("mirror", None)


def values_of(tensor: Tensor) -> Tensor | None:
    """Return a tensor's elements, on the CPU, in memory that its views share; None if unknown."""
    if type(tensor) is not FakeTensor:
        is_plain = type(tensor) is Tensor and tensor.device.type == "cpu"
        return tensor if is_plain and _is_few(tensor) else None
    known = vars(tensor.untyped_storage()).get("mirror")
    if known is None or known.nbytes() != tensor.untyped_storage().nbytes():  # resized since
        return None
    with no_dispatch():
        return _over(known, tensor)


def _over(storage: torch.UntypedStorage, tensor: Tensor) -> Tensor:
    """Return a real tensor of a fake one's layout over a storage."""
    values = torch.empty((), dtype=tensor.dtype, device="cpu")
    return values.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())


def _is_few(tensor: Tensor) -> bool:
    """Whether a real tensor that meets fake ones is a number, or whole numbers of the user's."""
    return not tensor.dim() or (tensor.dtype in _WHOLE and tensor.numel() <= KEPT_ELEMENTS)


def _copy_values(fake: Tensor, real: Tensor) -> None:
    if real.dtype not in _WHOLE or real.device.type != "cpu" or type(fake) is not FakeTensor:
        return
    if real.untyped_storage().nbytes():  # a model that waits in the shelter has empty storages
        mirror(fake, real)


@functools.cache
def _written(func: Any) -> tuple[Any, ...]:
    """Return the positions, or names, of the arguments that an op writes to."""
    return tuple(
        argument.name if argument.kwarg_only else position
        for position, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )


@functools.cache
def _reads_tensors(func: Any) -> bool:
    """Whether an op takes tensors, for which numbers may stand as in `torch.div(7, 2)`."""
    return any("Tensor" in str(argument.type) for argument in func._schema.arguments)


def _read_out(args: Sequence[Any], most: int) -> list[Any] | None:
    """Return arguments with every tensor replaced by its values; None where one is unknown."""
    values: list[Any] = []
    for arg in args:
        if isinstance(arg, Tensor):
            value: Any = values_of(arg) if arg.numel() <= most else None
        elif type(arg) in (list, tuple):
            value = _read_out(arg, most)
        else:
            values.append(arg)
            continue
        if value is None:
            return None
        values.append(value)
    return values


def _run(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Run an op on the CPU; return NotImplemented where it fails on these values."""
    named = {k: v for k, v in kwargs.items() if k not in ("device", "pin_memory", "layout")}
    if any(isinstance(value, Tensor) for value in named.values()):
        return NotImplemented
    if any(argument.name == "device" for argument in func._schema.arguments):
        named["device"] = torch.device("cpu")
    try:
        return func(*args, **named)
    except (RuntimeError, IndexError, ValueError):
        return NotImplemented


def _made(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], output: Tensor) -> Any:
    """Return what an op makes that reads no tensor; memory that is not set reads as ones."""
    if output.dtype not in _WHOLE:  # tables of floats: nobody takes a size from them
        return NotImplemented
    name = func._opname
    if name in _UNINITIALISED or "ones" in name:
        fill: Any = 1
    elif "zeros" in name:
        fill = 0
    elif "full" in name:
        fill = args[2] if name == "new_full" else args[1]
    else:
        return _run(func, args, {**kwargs, "dtype": output.dtype})
    if isinstance(fill, Tensor):
        return NotImplemented
    return torch.full(output.shape, fill, dtype=output.dtype, device="cpu")
