"""A loop of the user's own: the gradient with which it steps, against that of its whole batch.

Where a loss is given, the reference is the loss of the whole batch. Else the loop itself gives it:
it gets as many copies of the whole batch as it got micro-batches, so that whatever it divides by
their number it divides by again. A factor that is common to both is then not seen.

Invariant: the user's optimizers are copied, and the copies never step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autobatch.devices.copies import Copier
from autobatch.equivalence.compared_windows import ComparedWindows
from autobatch.equivalence.counts import FAILURES, Counts
from autobatch.equivalence.culprits import culprit
from autobatch.equivalence.draws import Draws, Span
from autobatch.equivalence.experiment import Ablation, Experiment, seed_all
from autobatch.equivalence.gradients import Gradients, differences, divided
from autobatch.equivalence.module_calls import spans
from autobatch.equivalence.numerics import Numerics, Reads
from autobatch.equivalence.result import Comparison, Culprit, Equivalence
from autobatch.equivalence.subject import Subject
from autobatch.equivalence.variations import variations
from autobatch.errors import WorkloadError
from autobatch.support.torch_private import current_transform_level
from autobatch.support.wording import passing
from autobatch.workload.optimizers import each_of, made_for, mapped
from autobatch.workload.sample import Rows
from autobatch.workload.tree import map_tensors, tensors
from autobatch.workload.workload import WindowFunction
from autobatch.workload.wrappers import unwrapped

__all__ = ["OwnWindow"]

_SMALL = 2.0**-40
"""What gradients are multiplied by so that no usual limit clips them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnWindow:
    """A function that runs one training window, under test.

    Attributes:
        subject: the model in one floating-point type, with the loss if one was given.
        function: `window(model, optimizer, batches)`, as in `Workload`.
        tolerance: the largest difference that rounding explains.
    """

    subject: Subject
    function: WindowFunction
    tolerance: float

    def result(self, compared: ComparedWindows) -> Equivalence:
        """Compare each window with its whole batch.

        Raises:
            WorkloadError: the function steps not exactly once in a window.
        """
        notes = list(compared.notes)
        found, scale, is_same_at_once = self._compared(compared), 1.0, False
        has_loss = self.subject.workload.loss is not None
        if has_loss and _worst(found) > self.tolerance:
            is_same_at_once = _worst(self._compared(compared, by_itself=True)) <= self.tolerance
            small = self._compared(compared, scale=_SMALL) if is_same_at_once else found
            if _worst(small) <= self.tolerance:
                found, scale = small, _SMALL
                notes.append(
                    "the window function changes gradients by their size, as clipping does: those "
                    "that are too small for that were compared with the loss's own, and the others "
                    "with what it makes of the whole batch at once"
                )
        culprits = self._culprits(compared, found, is_same_at_once)
        if not culprits:
            culprits, more = self._of_counts(compared, scale)
            notes += more
        if self.subject.workload.loss is None:
            notes.append(
                "the window was compared with itself, given copies of the whole batch: a factor "
                f"that is common to both is not seen; {passing('loss', 'lambda model, batch: …')} "
                "to compare with the loss of the whole batch"
            )
        return Equivalence(
            equivalent=not culprits,
            model=type(self.subject.workload.model).__name__,
            loss="window function",
            weight="what the window function does",
            dtype=str(self.subject.dtype).removeprefix("torch."),
            tolerance=self.tolerance,
            comparisons=tuple(
                Comparison(window=window, difference=apart, held_difference=apart)
                for (window, _), apart in zip(compared.windows, map(_largest, found), strict=True)
            ),
            parameters=max(found, key=_largest),
            culprits=tuple(culprits),
            notes=tuple(notes),
            seconds=0.0,
        )

    def _compared(self, compared: ComparedWindows, **how: Any) -> list[dict[str, float]]:
        return [self._differences(rows, window, **how) for window, rows in compared.windows]

    def _of_counts(
        self, compared: ComparedWindows, scale: float
    ) -> tuple[list[Culprit], list[str]]:
        """Return the culprit, and notes, of batches whose samples have unequal counts."""
        window, rows = compared.windows[-1]
        where = ["the window function"]
        if compared.is_large:
            return [], ["the model is large: samples of unequal counts were not tried"]
        reads, notes = Reads(), []
        if self.subject.workload.loss is not None:
            experiment = Experiment(subject=self.subject, rows=rows, window=window)
            reads = Counts.of(experiment, self.tolerance, light=None).reads
        for variation in variations(rows, reads):
            try:
                apart = _largest(self._differences(variation.rows, window, scale=scale))
            except FAILURES:  # the loss does not take such values
                continue
            if not self.tolerance < apart < math.inf:
                continue
            words = {"part": variation.where, "what": variation.what}
            found = culprit("own count", where, apart, words=words)
            if variation.is_usual:
                return [found], []
            notes.append(f"{found.finding}; if your batches hold such values, {found.advice}")
        return [], notes[:1]

    def _culprits(
        self, compared: ComparedWindows, found: Sequence[dict[str, float]], is_same_at_once: bool
    ) -> list[Culprit]:
        where, worst = ["the window function"], _worst(found)
        if worst <= self.tolerance:
            return []
        if is_same_at_once:
            return [culprit("own update", where, worst)]
        equal = [
            _largest(each)
            for (window, _), each in zip(compared.windows, found, strict=True)
            if len(set(window)) == 1
        ]
        is_equal = bool(equal) and max(equal) <= self.tolerance
        return [culprit("own weight" if is_equal else "own window", where, worst)]

    def _differences(
        self,
        rows: Rows,
        window: tuple[int, ...],
        *,
        by_itself: bool = False,
        scale: float = 1.0,
    ) -> dict[str, float]:
        """Return the difference of each parameter's gradient between the window and the batch.

        Args:
            rows: the batch.
            window: sizes of its micro-batches.
            by_itself: whether the function gives the gradient of the batch, too, as it does where
                there is no loss.
            scale: what gradients are multiplied by before the function sees them.
        """
        draws = Draws(rows.size)
        whole = (0, rows.size)
        if by_itself or self.subject.workload.loss is None:
            reference = self._stepped(rows, [whole] * len(window), draws)
        else:
            experiment = Experiment(subject=self.subject, rows=rows, window=window)
            reference = experiment.whole(Ablation())
            draws = experiment.draws(Ablation().seed)
        stepped = divided(self._stepped(rows, list(spans(window)), draws, scale), scale)
        self.subject.refresh()
        return differences(reference, [stepped], [1.0])

    def _stepped(
        self, rows: Rows, parts: Sequence[Span], draws: Draws, scale: float = 1.0
    ) -> Gradients:
        """Run the window function on parts of a batch; return the gradients at its step.

        Draws are recorded in the first part where none are known yet.
        """
        copier = Copier(torch.device("cpu"), lambda tensor, _: self.subject.copied(tensor))
        original = self.subject.workload.model
        model = copier.model(unwrapped(original)).train()
        if original is not unwrapped(original):
            copier.remember(original, model)
        function = copier.any(self.function)
        made = copier.optimizers_of(self.subject.workload.optimizer)
        exact = self.subject.dtype == torch.float64
        names = {id(p): name for name, p in model.named_parameters()}
        for parameter in model.parameters() if scale != 1 else ():
            if parameter.requires_grad:
                parameter.register_hook(lambda gradient: gradient * scale)
        gradients: dict[str, Tensor] = {}
        with copier.stage():
            given = mapped(lambda one: made_for(one, model), made)
            for optimizer in each_of(given):
                optimizer.step = _noting(optimizer, names, gradients)
            with Numerics(exact=exact, draws=draws, rows=None) as numerics:
                hand_out = _HandOut(rows, parts, numerics, is_known=bool(draws.made))
                model.register_forward_pre_hook(hand_out.before_call, with_kwargs=True)
                function(model, given, iter(hand_out))
        if not gradients:
            raise WorkloadError(
                f"the window function made no step over {len(parts)} micro-batches: call "
                "optimizer.step() after the last of them"
            )
        return gradients


def _largest(found: Mapping[str, float]) -> float:
    return max(found.values())


def _worst(found: Iterable[Mapping[str, float]]) -> float:
    return max(map(_largest, found))


class _HandOut:
    """Hands out the parts of a batch, each with its rows of the draws of the whole batch.

    A loop may take all of its micro-batches before it runs one, so that the inputs of a call of the
    model say which part runs.
    """

    def __init__(
        self, rows: Rows, parts: Sequence[Span], numerics: Numerics, *, is_known: bool
    ) -> None:
        self._rows, self._parts, self._numerics = rows, parts, numerics
        self._is_known = is_known
        self._part_of: dict[int, int] = {}
        self._running: int | None = None

    def __iter__(self) -> Iterator[Any]:
        """Yield copies of the parts."""
        for part, span in enumerate(self._parts):
            batch = map_tensors(Tensor.clone, self._rows.cut(*span))
            self._part_of |= {tensor.data_ptr(): part for tensor in tensors(batch)}
            self._begin(part)
            yield batch

    def before_call(self, _: Any, args: Any, kwargs: Any) -> None:
        """Begin the part that the inputs belong to."""
        if current_transform_level() is not None:
            return  # tensors have no address there
        known = [self._part_of.get(tensor.data_ptr()) for tensor in tensors((args, kwargs))]
        part = next((one for one in known if one is not None), None)
        if part is not None:
            self._begin(part)

    def _begin(self, part: int) -> None:
        if part == self._running:
            return
        self._running = part
        seed_all(1)
        if part or self._is_known:
            self._numerics.restart(self._parts[part])
        else:
            self._numerics.record()


def _noting(optimizer: Any, names: dict[int, str], found: dict[str, Tensor]) -> Callable[..., None]:
    """Return a step that notes the gradients and changes nothing.

    Raises:
        WorkloadError: it is called a second time.
    """
    steps = [0]

    def step(closure: Callable[[], Any] | None = None, *_: Any, **__: Any) -> None:
        if closure is not None:
            closure()
        steps[0] += 1
        if steps[0] > 1:
            raise WorkloadError(
                "the window function steps more than once: give one that runs one window, from "
                "the first micro-batch to the step"
            )
        for group in optimizer.param_groups:
            for index, parameter in enumerate(group["params"]):
                if parameter.grad is not None:
                    name = names.get(id(parameter), f"parameter {index} of the optimizer")
                    found[name] = parameter.grad.detach().clone()

    return step
