"""Values that tensors without memory do have: small whole numbers, and what follows from them.

Models read sizes back from the GPU: the grid of patches of every image, the lengths of sequences,
the shapes of feature maps. Those sizes are numbers in the user's code, small integer buffers and
small integer tensors of the sample. Ops on them are run for real, on the CPU, and their results are
kept in the mirrors of the fake tensors (`elements.py`).

Invariant: an op that writes what is not known to a tensor ends its mirror.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from autobatch.devices.copies import blank
from autobatch.devices.virtual.elements import (
    KEPT_ELEMENTS,
    WHOLE,
    forget_values,
    has_values,
    note_write,
    placeholder_of,
    set_bounds,
    set_mixed,
    set_placeholder,
    set_values,
    values_of,
)
from autobatch.support.torch_private import FakeTensor, no_dispatch, tree_leaves

__all__ = ["KnownValues"]

GIVEN_ELEMENTS = 64
"""Elements of one sample up to which a tensor is taken for sizes; token ids are more."""

_MOST_ELEMENTS = 2**22
_MOST_TIMES = 256
"""Elements up to which a table of floats, such as the times that a solver steps to, is followed."""

_FLOATS = frozenset((torch.float32, torch.float64))
_UNINITIALISED = frozenset("empty new_empty empty_like".split())
_FILLED = frozenset(
    "zeros ones full new_zeros new_ones new_full zeros_like ones_like full_like".split()
)
_COMPUTED = frozenset("arange eye linspace tril_indices triu_indices scalar_tensor".split())
_MAKERS = _UNINITIALISED | _FILLED | _COMPUTED
"""Ops that read the value of no tensor."""


class KnownValues:
    """Follows known values through the ops of one run."""

    def __init__(self, micro_batch: int):
        """Follow a run at this micro-batch."""
        self._most = min(KEPT_ELEMENTS * micro_batch, _MOST_ELEMENTS)

    def lift(self, mode: Any, real: Tensor) -> Any:
        """Make a fake of a tensor that the user's code makes of numbers, with its values."""
        is_plain = type(real) is Tensor and real.layout is torch.strided and not real.is_complex()
        if not is_plain or real.device.type != "cpu" or real.numel() > self._most:
            return NotImplemented
        fake = mode.fake_of(real)
        set_values(fake, real)
        return fake

    def give(self, fake: Tensor, real: Tensor) -> None:
        """Let the fake of a tensor of the sample have its values, if it is small enough for sizes.

        A single element that is expanded has none: it stands for a sample on `meta`.
        """
        rows = real.shape[0] if real.dim() else 1
        is_few = real.numel() <= min(GIVEN_ELEMENTS * rows, _MOST_ELEMENTS)
        if is_few and (real.numel() == 1 or any(real.stride())):
            _copy_values(fake, real)
        elif real.dtype in WHOLE and type(fake) is FakeTensor and real.device.type == "cpu":
            _tell_range(fake, real)

    def blank(self, original: Tensor, device: torch.device) -> Tensor:
        """Make memory of a tensor's layout on a device; a small buffer has its values there.

        What stays on the CPU has its values in any dtype, and so has a short table of floats that
        is no parameter: code may read them.
        """
        made = blank(original, device)
        if original.numel() <= KEPT_ELEMENTS:
            _copy_values(made, original)
            is_table = type(original) is Tensor and original.numel() <= _MOST_TIMES
            may_be_read = device.type == "cpu" or is_table
            if may_be_read and original.dtype in _FLOATS and _is_real(original):
                with torch.no_grad():
                    set_values(made, original)
        return made

    def result(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Run an op for real, on the CPU; return NotImplemented where a value is unknown."""
        traits = _TRAITS.get(id(func)) or _traits(func)
        values = _values_in(args, self._most) if traits.is_sure else None
        return NotImplemented if values is None else _run(func, values, kwargs)

    def only_reads(self, func: Any) -> bool:
        """Whether an op writes to no argument, and makes nothing but of its tensors."""
        traits = _TRAITS.get(id(func)) or _traits(func)
        return not (traits.written or traits.is_maker or traits.is_collective)

    def follow(
        self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any
    ) -> None:
        """Remember what an op that has just run made known, or made unknown."""
        traits = _TRAITS.get(id(func)) or _traits(func)
        if traits.is_collective:  # collectives write, and do not say so
            for leaf in tree_leaves(args):
                if type(leaf) is FakeTensor:
                    note_write(leaf)
        if traits.written:
            self._write(func, args, kwargs, traits.written)
        elif isinstance(output, (list, tuple)):
            if any(map(self._may_be_known, output)):
                made = self.result(func, args, kwargs)
                if made is not NotImplemented:
                    for part, real in zip(output, made, strict=True):
                        self._remember(part, real)
        elif self._may_be_known(output):
            if traits.is_maker:
                self._remember(output, _made(func, args, kwargs, output))
            else:
                self._remember(output, self.result(func, args, kwargs))

    def _may_be_known(self, output: Any) -> bool:
        return (
            type(output) is FakeTensor
            and (output.dtype in WHOLE or output.dtype in _FLOATS)
            and output.numel() <= self._most
            and not has_values(output)  # a view already has those of its base
        )

    def _remember(self, output: Any, real: Any) -> None:
        is_alike = isinstance(real, Tensor) and real.shape == output.shape
        if is_alike and self._may_be_known(output):
            set_values(output, real)

    def _write(
        self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], written: Sequence[Any]
    ) -> None:
        """Run an op that writes on the mirrors too, or end them where that is not possible."""
        targets: list[Any] = []
        for key in written:
            target = kwargs.get(key) if isinstance(key, str) else args[key]
            targets += target if isinstance(target, (list, tuple)) else (target,)
        targets = [target for target in targets if type(target) is FakeTensor]
        for target in targets:
            note_write(target)
        known = [has_values(target) for target in targets]
        if not any(known) or (all(known) and self.result(func, args, kwargs) is not NotImplemented):
            return
        for target in targets:
            forget_values(target)


def _tell_range(fake: Tensor, real: Tensor) -> None:
    """Tell between which numbers the elements of a tensor vary, or which one they all are."""
    if not real.numel() or not any(real.stride()) or not real.untyped_storage().nbytes():
        return
    with no_dispatch():
        low, high = int(real.min()), int(real.max())
    if low == high:
        set_placeholder(fake, bool(low) if real.dtype is torch.bool else low)
    elif real.dtype is torch.bool:
        set_mixed(fake, 1.0)
        set_placeholder(fake, True)
    else:
        set_bounds(fake, low, high)


def _copy_values(fake: Tensor, real: Tensor) -> None:
    if real.dtype not in WHOLE or real.device.type != "cpu" or type(fake) is not FakeTensor:
        return
    if type(real) is FakeTensor:
        if (values := values_of(real)) is not None:
            set_values(fake, values)
        return
    if real.untyped_storage().nbytes():  # those of a model that is offloaded to the host are empty
        set_values(fake, real)


def _is_real(tensor: Tensor) -> bool:
    is_plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.device.type == "cpu"
    return is_plain and bool(tensor.untyped_storage().nbytes())


class _Traits(NamedTuple):
    """What counts of an op.

    Attributes:
        written: the positions, or names, of the arguments that it writes to.
        is_sure: whether its results follow from the tensors that it takes; numbers may be in their
            place, as in `torch.div(7, 2)`.
        is_maker: whether it reads the value of no tensor.
        is_collective: whether it belongs to `torch.distributed`.
        func: the op, held so that its id is no other's.
    """

    written: tuple[Any, ...]
    is_sure: bool
    is_maker: bool
    is_collective: bool
    func: Any


_TRAITS: dict[int, _Traits] = {}
"""By the id of an op, whose own hash is slow."""


def _traits(func: Any) -> _Traits:
    written = tuple(
        argument.name if argument.kwarg_only else position
        for position, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )
    is_random = torch.Tag.nondeterministic_seeded in func.tags or "empty" in func._opname
    reads = any("Tensor" in str(argument.type) for argument in func._schema.arguments)
    _TRAITS[id(func)] = traits = _Traits(
        written=written,
        is_sure=reads and not is_random,
        is_maker=func._opname in _MAKERS,
        is_collective=func.namespace == "c10d",
        func=func,
    )
    return traits


def _values_in(args: Sequence[Any], most: int) -> list[Any] | None:
    """Return arguments with every tensor replaced by its values; None where one is unknown."""
    values: list[Any] = []
    for arg in args:
        value = arg
        if isinstance(arg, Tensor):
            value = values_of(arg) if arg.numel() <= most else None
        elif type(arg) in (list, tuple):
            value = _values_in(arg, most)
        if value is None and arg is not None:
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
    """Return what an op makes that reads no tensor; uninitialised memory reads as ones."""
    if output.dtype not in WHOLE and output.numel() > _MOST_TIMES:
        return NotImplemented
    if func._opname in _COMPUTED:
        return _run(func, args, {**kwargs, "dtype": output.dtype})
    fill = 1 if func._opname in _UNINITIALISED else placeholder_of(output)
    return torch.full(output.shape, fill, dtype=output.dtype, device="cpu")
