"""Records the calls of every module, and repeats a run to see which modules answer differently.

A run is repeated with one thing changed, such as the values of the later samples. After each
module, the part of its output that must not have changed is compared with the record and then
restored, so that a module is blamed for its own changes and not for those of earlier modules.

Calls inside of a transform of `torch.func` are the business of whoever calls the transform: the
tensors there hide their samples, and cannot be kept.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from autobatch.equivalence.draws import Span, other_random_state, put_back
from autobatch.equivalence.gradients import is_continuous
from autobatch.equivalence.numerics import Numerics
from autobatch.support.torch_private import current_transform_level
from autobatch.workload.tree import tensors, with_tensors

__all__ = [
    "LOSS",
    "Call",
    "LocatedCall",
    "OutputRecorder",
    "RecordedRun",
    "Rerun",
    "changed_values",
    "may_be_by_sample",
    "module_hooks",
    "recorded_calls",
    "run_in_micro_batches",
    "shapes_alone",
    "spans",
]

LOSS = "the loss"
"""Stands for the loss where a module's name is expected: it calls the model."""


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a module: its name, its input and its output tensors."""

    name: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class Axis:
    """The dimension along which a tensor holds samples, and the entries there of each sample."""

    dim: int
    entries: int

    def cut(self, tensor: Tensor, start: int, stop: int) -> Tensor:
        """Return some of the samples."""
        return tensor.narrow(self.dim, start * self.entries, (stop - start) * self.entries)


Axes = tuple[Axis | None, ...]


@dataclass(frozen=True, slots=True)
class LocatedCall:
    """A call of a module with the sample axis of each tensor; None where a tensor has none."""

    call: Call
    inputs: Axes
    outputs: Axes


@dataclass(frozen=True, slots=True)
class RecordedRun:
    """The calls of a run, with the sample axes of their tensors.

    Axes are found by comparing the shapes of two runs on batches of different size.

    Attributes:
        samples: of the larger batch.
        calls: by the module's name and the number of its earlier calls; only those that both
            batches made.
    """

    samples: int
    calls: Mapping[tuple[str, int], LocatedCall]

    def is_by_sample(self, key: tuple[str, int]) -> bool:
        """Whether every floating-point output of a call has one part for each sample."""
        located = self.calls.get(key)
        if located is None:
            return False
        axes = [
            axis
            for tensor, axis in zip(located.call.outputs, located.outputs, strict=False)
            if is_continuous(tensor)
        ]
        return bool(axes) and None not in axes

    @classmethod
    def of(
        cls, calls: Sequence[Call], samples: int, fewer: Sequence[Call], fewer_samples: int
    ) -> RecordedRun:
        """Find the sample axes of a run from the calls of another one on fewer samples."""

        def axes(some: Sequence[Tensor], others: Sequence[Tensor]) -> Axes:
            return tuple(
                _axis(a.shape, samples, b.shape, fewer_samples)
                for a, b in zip(some, others, strict=False)
            )

        smaller = dict(_counted(fewer))
        return cls(
            samples,
            {
                key: LocatedCall(
                    call,
                    axes(call.inputs, smaller[key].inputs),
                    axes(call.outputs, smaller[key].outputs),
                )
                for key, call in _counted(calls)
                if key in smaller
            },
        )


def _counted(calls: Sequence[Call]) -> Iterator[tuple[tuple[str, int], Call]]:
    seen: Counter[str] = Counter()
    for call in calls:
        yield (call.name, seen[call.name]), call
        seen[call.name] += 1


def _axis(
    shape: Sequence[int], samples: int, other: Sequence[int], other_samples: int
) -> Axis | None:
    if len(shape) != len(other):
        return None
    changed = [dim for dim in range(len(shape)) if shape[dim] != other[dim]]
    if len(changed) != 1:
        return None  # no dimension depends on the samples, or two do, as in a similarity matrix
    dim = changed[0]
    entries, rest = divmod(shape[dim], samples)
    return Axis(dim, entries) if not rest and other[dim] == entries * other_samples else None


def recorded_calls(model: nn.Module, run: Callable[[], Any]) -> list[Call]:
    """Call `run`, and return every call of a module inside it."""
    calls: list[Call] = []

    def end(name: str, _caller: str, inputs: tuple[Tensor, ...], output: Any) -> Any:
        calls.append(Call(name, inputs, _tensors(output)))
        return output

    with module_hooks(model, end):
        run()
    return calls


@dataclass(slots=True)
class OutputRecorder:
    """Keeps the outputs of the outermost calls that can be answered from a record.

    Attributes:
        may_answer: whether the call of a module, by its name and number, can be.
        answers: the outputs, by caller, name and number among that caller's calls of that name;
            with the key of each in a `RecordedRun`. One that had a gradient requires one.
        passed: those of them through which a gradient went before the loss was there, as where
            the loss takes one by its inputs: an answer from the record would have none.
        is_open: whether the loss is still being computed.
    """

    may_answer: Callable[[tuple[str, int], Any], bool]
    answers: dict[tuple[str, str, int], tuple[tuple[str, int], Any]] = field(default_factory=dict)
    passed: set[tuple[str, str, int]] = field(default_factory=set)
    is_open: bool = True
    _kept: list[tuple[tuple[str, str, int], tuple[tuple[str, int], Any]]] = field(
        default_factory=list
    )
    _begun: list[int] = field(default_factory=list)
    _seen: Counter[str] = field(default_factory=Counter)
    _numbers: Counter[tuple[str, str]] = field(default_factory=Counter)

    def begin(self, _caller: str) -> None:
        """Remember what was kept before a call."""
        self._begun.append(len(self._kept))

    def end(self, name: str, caller: str, output: Any) -> None:
        """Keep the output of a call in place of those of the calls inside of it, if possible."""
        inner = self._begun.pop()
        key, number = (name, self._seen[name]), self._numbers[caller, name]
        self._seen[name] += 1
        self._numbers[caller, name] += 1
        if self.may_answer(key, output):
            del self._kept[inner:]
            where = (caller, name, number)
            copied = with_tensors(output, [self._copied(t, where) for t in tensors(output)])
            self._kept.append((where, (key, copied)))
        if caller == LOSS:
            self.answers.update(self._kept)
            self._kept.clear()

    def _copied(self, tensor: Tensor, where: tuple[str, str, int]) -> Tensor:
        def note(_: Tensor) -> None:
            if self.is_open:
                self.passed.add(where)

        copied = tensor.detach().clone()
        if not tensor.requires_grad:
            return copied
        if not tensor.is_leaf:  # a parameter would keep the hook
            tensor.register_hook(note)
        return copied.requires_grad_()


def may_be_by_sample(output: Any, samples: int) -> bool:
    """Whether the floating-point tensors of an output may have one part for each sample."""
    found = [t for t in tensors(output) if is_continuous(t)]
    return bool(found) and all(any(d and d % samples == 0 for d in t.shape) for t in found)


@dataclass(slots=True)
class Rerun:
    """A repetition of a recorded run, in which part of every output must stay the same.

    Attributes:
        recorded: the run to compare with.
        kept: start and end of the samples that must stay the same; all must if None.
        blamed: modules that changed what must stay the same.
    """

    recorded: RecordedRun
    kept: tuple[int, int] | None = None
    blamed: list[str] = field(default_factory=list)
    _seen: Counter[str] = field(default_factory=Counter)

    def run(self, model: nn.Module, run: Callable[[], Any]) -> list[str]:
        """Call `run`, and return the names of the modules to blame."""
        with module_hooks(model, self._end):
            run()
        return list(dict.fromkeys(self.blamed))

    def _end(self, name: str, caller: str, inputs: tuple[Tensor, ...], output: Any) -> Any:
        located = self.recorded.calls.get((name, self._seen[name]))
        self._seen[name] += 1
        if located is None:
            return output  # a call that the two recorded batches do not share
        call = located.call
        if self._changed(inputs, call.inputs, located.inputs):
            self.blamed.append(caller)
        elif self._changed(_tensors(output), call.outputs, located.outputs):
            self.blamed.append(name)
        return self._put_back(output, call.outputs, located.outputs)

    def _changed(self, now: Sequence[Tensor], then: Sequence[Tensor], axes: Axes) -> bool:
        return any(
            _differ(self._kept(a, axis), self._kept(b, axis))
            for a, b, axis in zip(now, then, axes, strict=False)
            if a.shape == b.shape and (axis or self.kept is None)
        )

    def _kept(self, tensor: Tensor, axis: Axis | None) -> Tensor:
        if self.kept is None or axis is None:
            return tensor
        return axis.cut(tensor, *self.kept)

    def _put_back(self, output: Any, then: Sequence[Tensor], axes: Axes) -> Any:
        """Restore the samples that must stay the same, and change the others once more."""
        found = list(tensors(output))
        for index, (now, old, axis) in enumerate(zip(tuple(found), then, axes, strict=False)):
            if now.shape != old.shape or not is_continuous(now):
                continue
            if self.kept is None:
                found[index] = _with_value(now, old)
            elif axis is not None:
                start, stop = self.kept
                earlier = axis.cut(now, 0, start)
                later = axis.cut(now, stop, self.recorded.samples)
                parts = [changed_values(earlier), axis.cut(old, start, stop), changed_values(later)]
                found[index] = _with_value(now, torch.cat(parts, axis.dim))
        return with_tensors(output, found)


def _with_value(tensor: Tensor, value: Tensor) -> Tensor:
    """Return another value with a tensor's history: the loss may take a gradient through it."""
    changed = tensor.clone()
    changed.detach().copy_(value.detach())  # no one has seen it yet
    return changed


def changed_values(tensor: Tensor) -> Tensor:
    """Return values of the same sign and scale, each entry changed by another factor."""
    steps = torch.arange(tensor.numel(), dtype=torch.float64).reshape(tensor.shape)
    return tensor * (0.75 + 0.25 * torch.sin(1.7 * steps + 1.0)).to(tensor.dtype)


def run_in_micro_batches(
    model: nn.Module,
    name: str,
    recorded: RecordedRun,
    window: Sequence[int],
    numerics: Numerics,
) -> None:
    """Make a module of a replica run the whole batch one micro-batch at a time.

    Each micro-batch gets its rows of the draws that the module made for the whole batch.
    """
    module = model.get_submodule(name)
    located = recorded.calls[name, 0]
    before, after = located.inputs, located.outputs
    whole = recorded.samples
    original = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        found = list(tensors((args, kwargs)))
        axes = {i: axis for i, axis in enumerate(before[: len(found)]) if axis is not None}
        if current_transform_level() is not None or any(
            found[i].shape[axis.dim] != whole * axis.entries for i, axis in axes.items()
        ):
            return original(*args, **kwargs)  # an enclosing module runs in micro-batches already
        outputs, position, others = [], numerics.position, other_random_state()
        for start, stop in spans(window):
            part = [
                axes[i].cut(tensor, start, stop) if i in axes else tensor
                for i, tensor in enumerate(found)
            ]
            some, named = with_tensors((args, kwargs), part)
            put_back(others)
            with numerics.part((start, stop), position=position):
                outputs.append(original(*some, **named))
        return _joined(outputs, after, window)

    module.forward = forward


def _joined(outputs: Sequence[Any], axes: Axes, window: Sequence[int]) -> Any:
    """Concatenate the outputs of micro-batches; average those without a sample axis."""
    found = [list(tensors(output)) for output in outputs]
    joined = list(found[0])
    for index, axis in enumerate(axes[: len(joined)]):
        parts = [one[index] for one in found]
        if axis is not None:
            joined[index] = torch.cat(parts, axis.dim)
        elif is_continuous(parts[0]):
            shares = [size / sum(window) for size in window]
            joined[index] = torch.stack(
                [part * share for part, share in zip(parts, shares, strict=True)]
            ).sum(0)
    return with_tensors(outputs[0], joined)


def spans(window: Sequence[int]) -> Iterator[Span]:
    """Yield the samples of each micro-batch of a window."""
    start = 0
    for size in window:
        yield start, start + size
        start += size


@contextmanager
def module_hooks(
    model: nn.Module,
    end: Callable[[str, str, tuple[Tensor, ...], Any], Any],
    begin: Callable[[str], None] = lambda caller: None,
    kept: Callable[[Any], tuple[Tensor, ...]] | None = None,
) -> Iterator[None]:
    """Call `begin(caller)` before every module and `end(name, caller, inputs, output)` after it.

    What `end` returns replaces the output. The model itself is named "", its caller `LOSS`. `kept`
    makes the inputs of the arguments: copies of the tensors if None. Neither is called inside of a
    transform of `torch.func`.
    """
    running: list[tuple[str, tuple[Tensor, ...]]] = []
    kept = kept or _tensors

    def before(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            if current_transform_level() is not None:
                return
            begin(running[-1][0] if running else LOSS)
            running.append((name, kept((args, kwargs))))

        return hook

    def after(_: nn.Module, args: Any, output: Any) -> Any:
        if current_transform_level() is not None:
            return output
        name, inputs = running.pop()
        return end(name, running[-1][0] if running else LOSS, inputs, output)

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            hooks.enter_context(module.register_forward_pre_hook(before(name), with_kwargs=True))
            hooks.enter_context(module.register_forward_hook(after))
        yield


def shapes_alone(values: Any) -> tuple[Tensor, ...]:
    """Return tensors without values, of the shapes and types of those in a structure."""
    return tuple(torch.empty(t.shape, dtype=t.dtype, device="meta") for t in tensors(values))


def _tensors(values: Any) -> tuple[Tensor, ...]:
    return tuple(tensor.detach().clone() for tensor in tensors(values))


def _differ(one: Tensor, other: Tensor) -> bool:
    if torch.equal(one, other):
        return False
    if not is_continuous(one):
        return True
    apart = torch.where(one == other, 0.0, one - other).abs()  # equal infinities, as in masks
    scale = other[other.isfinite()].abs()
    limit = 1e4 * torch.finfo(one.dtype).eps * (float(scale.max()) if scale.numel() else 0.0)
    return not float(apart.max()) <= limit
