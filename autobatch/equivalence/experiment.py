"""Experiments: the gradient of one batch at once and in micro-batches, with causes removed or not.

Invariant: every measurement starts from a fresh replica, so that none depends on another; what was
measured with the same causes removed is remembered.
"""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from autobatch.equivalence.draws import Draws, Span, other_random_state
from autobatch.equivalence.gradients import Gradients, Measured, Weigh, divided, largest_of
from autobatch.equivalence.module_calls import (
    LOSS,
    Axes,
    Call,
    OutputRecorder,
    RecordedRun,
    may_be_by_sample,
    module_hooks,
    run_in_micro_batches,
    shapes_alone,
    spans,
)
from autobatch.equivalence.numerics import Numerics, Reads
from autobatch.equivalence.subject import Replica, Subject
from autobatch.equivalence.weights import shares
from autobatch.errors import UsageError, WorkloadError
from autobatch.support.interrupts import let_through
from autobatch.workload.sample import Rows
from autobatch.workload.tree import map_tensors
from autobatch.workload.workload import AUTOCAST_DTYPES

__all__ = ["Ablation", "Experiment", "seed_all"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ablation:
    """Which possible causes are removed from a run, to see whether a difference goes with them.

    Attributes:
        seed: of the random numbers of the whole batch.
        other_draws: seed of the micro-batches' own random numbers, as in training; if None, each
            micro-batch gets its rows of what the whole batch drew.
        continued: Python's and NumPy's random numbers go on from one micro-batch to the next.
        state: every micro-batch starts from the same state of the model.
        layers: modules that see one micro-batch at a time in the whole batch as well.
        hooks: the hooks of gradients do not run.
        evaluated: the model is in evaluation mode, where dropout draws nothing.
        noise: the share of its value by which each parameter is changed, to see rounding.
    """

    seed: int = 1
    other_draws: int | None = None
    continued: bool = False
    state: bool = False
    layers: frozenset[str] = frozenset()
    hooks: bool = False
    evaluated: bool = False
    noise: float = 0.0


@dataclass(slots=True, kw_only=True)
class Ran:
    """What was observed while gradients were computed.

    Attributes:
        drawing: modules whose own code drew random numbers.
        unmatched: draws that could not be given by row.
        apart: how far the parameters of distributions are from those of the whole batch.
        decides: whether other random numbers may run other code.
        steps: whether a hook changes parameters in the backward pass.
        hooked: parameters and modules with hooks of gradients.
        loss_kind: how the loss was obtained.
        reads: what the model and the loss compute with.
    """

    drawing: list[str] = field(default_factory=list)
    unmatched: int = 0
    apart: float = 0.0
    decides: bool = False
    steps: bool = False
    hooked: list[str] = field(default_factory=list)
    loss_kind: str = ""
    reads: Reads = field(default_factory=Reads)


@dataclass(slots=True, kw_only=True)
class Experiment:
    """A batch, and the sizes of the micro-batches that it is cut into.

    Attributes:
        subject: the model and loss under test.
        rows: the batch.
        window: sizes of the micro-batches.
        weight: the weight of a micro-batch; its number of samples if None.
        calls: the modules' calls with inputs and outputs; needed where layers are removed.
        ran: what was observed so far.
    """

    subject: Subject
    rows: Rows
    window: tuple[int, ...]
    weight: Weigh | None = None
    calls: RecordedRun | None = None
    ran: Ran = field(default_factory=Ran)
    _draws: dict[int, Draws] = field(default_factory=dict)
    _wholes: dict[Ablation, Gradients] = field(default_factory=dict)
    _parts: dict[Ablation, list[Gradients]] = field(default_factory=dict)
    _measured: dict[Ablation, Measured] = field(default_factory=dict)
    _shapes: dict[int, list[Call]] = field(default_factory=dict)
    _recorder: OutputRecorder | None = None

    def cast(self, subject: Subject) -> Experiment:
        """Return the experiment in the type of another subject, of which nothing was measured."""
        batch = map_tensors(subject.cast, self.rows.batch)
        rows = replace(self.rows, batch=batch)
        return Experiment(subject=subject, rows=rows, window=self.window, weight=self.weight)

    def pieces(self) -> list[Any]:
        """Return the micro-batches."""
        return [self.rows.cut(*span) for span in spans(self.window)]

    def shares(self) -> list[float]:
        """Return each micro-batch's share of the window's weight.

        Raises:
            UsageError: the weights are negative or all zero.
        """
        if self.weight is None:
            return shares(self.window)
        weights = [float(self.weight(piece)) for piece in self.pieces()]
        if not (min(weights) >= 0 < sum(weights) < float("inf")):
            raise UsageError(
                f"weight(micro_batch) gives {weights}: use numbers of at least 0, not all of them 0"
            )
        return shares(weights)

    def seeds(self) -> list[float]:
        """Return what the backward pass of each micro-batch begins with: its share, as in training.

        One that counts for nothing begins with 1, because its gradient shows whether other weights
        are right.
        """
        return [share or 1.0 for share in self.shares()]

    def measured(self, ablation: Ablation) -> Measured:
        """Return the gradients of the batch and of its micro-batches."""
        if ablation not in self._measured:
            parts = self.parts(ablation)
            self._measured[ablation] = Measured(whole=self.whole(ablation), parts=parts)
        return self._measured[ablation]

    def whole(self, ablation: Ablation) -> Gradients:
        """Return the gradient of all samples at once.

        Raises:
            WorkloadError: its largest entry is zero, or one is not finite.
        """
        key = replace(ablation, other_draws=None, continued=False, state=False)
        if key not in self._wholes:
            if ablation.layers:
                self.whole(Ablation(seed=ablation.seed))  # records the draws
            replica = self._replica(ablation)
            everything = (0, self.rows.size)
            self._wholes[key] = self._gradients(replica, everything, key, 1.0)
            _check(self._wholes[key])
            self.subject.refresh()
        return self._wholes[key]

    def parts(self, ablation: Ablation) -> list[Gradients]:
        """Return the gradient of each micro-batch, run one after the other as in a window.

        As in training, a backward pass begins with the micro-batch's share of the window, because
        code that clips gradients inside of the graph sees numbers of that size. What it gives is
        divided by the share again, so that other weights can be tried.

        Hooks may see what was added up so far, so that where there are hooks, the micro-batches
        are added up, and one part is the whole window.
        """
        key = replace(ablation, layers=frozenset())
        if key in self._parts:
            return self._parts[key]
        if ablation.other_draws is None:
            self.whole(key)  # records the draws
        replica, found = self._replica(key), []
        added = not ablation.hooks and bool(self.ran.hooked)
        shares = self.shares()
        sizes = zip(spans(self.window), shares, self.seeds(), strict=True)
        for step, (span, share, seed) in enumerate(sizes):
            if ablation.state and step:
                replica = self._replica(key)
            part = self._gradients(replica, span, key, share if added else seed, step, keeps=added)
            found.append(part if added else divided(part, seed))
        self.subject.refresh()
        if added:
            largest = shares.index(max(shares))
            window = divided(found[-1], shares[largest])
            found = [window if step == largest else {} for step in range(len(found))]
        self._parts[key] = found
        return found

    def draws(self, seed: int) -> Draws:
        """Return what the whole batch drew; it has to have run with this seed."""
        return self._draws[seed]

    def shapes(self) -> RecordedRun:
        """Return the shapes of all calls of modules, with their sample axes."""
        whole, few = self.rows.size, min(self.window)
        self.measured(Ablation())
        return RecordedRun.of(self._shapes[whole], whole, self._shapes[few], few)

    def outputs(self) -> dict[tuple[str, str, int], tuple[Any, Axes]]:
        """Return the outputs of the outermost calls that have one part for each sample.

        Raises:
            WorkloadError: the loss needs their history, which a record does not have.

        They were kept in the first run of the whole batch, where shapes alone let one guess which
        these are. Where the guess was wrong, another run keeps the right ones.
        """
        shapes = self.shapes()
        recorder = self._recorder
        assert recorder is not None
        if not all(shapes.is_by_sample(key) for key, _ in recorder.answers.values()):
            recorder = OutputRecorder(lambda key, _: shapes.is_by_sample(key))
            replica, kept = self.subject.replica(), recorder

            def end(name: str, caller: str, _inputs: Any, output: Any) -> Any:
                kept.end(name, caller, output)
                return output

            with module_hooks(replica.model, end, kept.begin, kept=lambda _: ()):
                self.forward(self.rows.cut(0, self.rows.size), replica=replica)
        if recorder.passed & recorder.answers.keys():
            raise WorkloadError("the loss takes gradients through outputs of the model")
        return {
            where: (output, shapes.calls[key].outputs)
            for where, (key, output) in recorder.answers.items()
        }

    def forward(
        self,
        batch: Any,
        *,
        replica: Replica | None = None,
        run: Callable[[Replica], Any] | None = None,
        rows: Span | None = None,
        seed: int = 1,
        reads: Reads | None = None,
    ) -> Any:
        """Run the loss alone, with the whole batch's draws; return what it returns.

        Gradients are recorded as in training, because the loss may take some itself.

        Args:
            batch: for the loss.
            replica: to run; a new one if None.
            run: is called with the replica in place of the loss.
            rows: the samples that the draws belong to; all if None.
            seed: of the whole batch's draws.
            reads: is told what tensors are compared with.
        """
        replica = self.subject.replica() if replica is None else replica
        self.whole(Ablation(seed=seed))
        seed_all(seed)
        draws = self._draws[seed]
        span = rows or (0, draws.samples)
        with replica.stage, self.running(draws, span) as numerics:
            if reads is not None:
                numerics.reads = replace(reads, storages=set())
            if run is not None:
                return run(replica)
            return replica.loss(replica.model, batch)

    @contextlib.contextmanager
    def running(self, draws: Draws | None, rows: Span | None) -> Iterator[Numerics]:
        """Set the numerics in which the user's code runs inside the context.

        Args:
            draws: of a whole batch; random numbers are drawn as in training if None.
            rows: the samples whose rows of the draws are given; all draws are recorded if None.
        """
        autocast = AUTOCAST_DTYPES.get(self.subject.autocast or "")
        exact = self.subject.dtype == torch.float64
        with (
            Numerics(exact=exact, draws=draws, rows=rows) as numerics,
            torch.autocast("cpu", dtype=autocast) if autocast else contextlib.nullcontext(),
        ):
            yield numerics

    def _replica(self, ablation: Ablation) -> Replica:
        replica = self.subject.replica(hooks=not ablation.hooks, noise=ablation.noise)
        if ablation.evaluated:
            replica.model.eval()
        return replica

    def _gradients(
        self,
        replica: Replica,
        span: Span,
        ablation: Ablation,
        factor: float,
        step: int = 0,
        *,
        keeps: bool = False,
    ) -> Gradients:
        """Run some of the samples; return their gradients, added to those before if it `keeps`."""
        if not keeps:
            for tensor in replica.trained.values():
                tensor.grad = None
        if not ablation.hooks:
            self.ran.hooked = _hooked(replica)
        is_whole = span == (0, self.rows.size)
        free = ablation.other_draws is not None and not is_whole
        seed = ablation.seed + (ablation.other_draws or 0) + 1 + step if free else ablation.seed
        if not (ablation.continued and step):
            seed_all(seed)
        before = other_random_state()
        known = self._draws.get(ablation.seed)
        draws = None if free else known or Draws(self.rows.size)
        rows = None if known is None else span
        with replica.stage, self.running(draws, rows) as numerics:
            let_through()
            for name in ablation.layers:
                assert self.calls is not None
                run_in_micro_batches(replica.model, name, self.calls, self.window, numerics)
            numerics.reads = self.ran.reads if is_whole and not self.ran.reads.storages else None
            with self._observed(replica, span, numerics):
                value = replica.value(self.rows.cut(*span))
            numerics.reads = None
            self.ran.loss_kind = replica.loss_kind
            self._compare_states(numerics, before, is_whole)
            versions = [tensor._version for tensor in replica.trained.values()]
            value.backward(torch.full_like(value, factor))
            let_through()
        if draws is not None:
            self._draws[ablation.seed] = draws
        ran = self.ran
        ran.decides |= numerics.decides
        if not free:
            ran.unmatched += numerics.unmatched
            ran.apart = max(ran.apart, numerics.apart)
        if versions != [tensor._version for tensor in replica.trained.values()]:
            ran.steps = True
        if ran.steps and not ablation.hooks:
            return self._updates(replica)
        return {
            name: _dense(tensor.grad)
            for name, tensor in replica.trained.items()
            if tensor.grad is not None
        }

    def _updates(self, replica: Replica) -> Gradients:
        """Return by how much hooks have changed the parameters, in place of gradients."""
        original = self.subject.original
        return {name: t.detach() - original(t) for name, t in replica.trained.items()}

    @contextlib.contextmanager
    def _observed(self, replica: Replica, span: Span, numerics: Numerics) -> Iterator[None]:
        """Note, in the first runs, the shapes of all calls and the modules that draw."""
        size = span[1] - span[0]
        if size in self._shapes or size not in (self.rows.size, min(self.window)):
            yield
            return
        calls = self._shapes[size] = []
        recorder = OutputRecorder(lambda _, output: may_be_by_sample(output, self.rows.size))
        if size == self.rows.size:
            self._recorder = recorder
        seen = (numerics.drawn, other_random_state())
        drawing: list[str] = []

        def note(name: str) -> None:
            nonlocal seen
            before, seen = seen, (numerics.drawn, other_random_state())
            if seen != before:
                drawing.append(name)

        def begin(caller: str) -> None:
            note(caller)
            if size == self.rows.size:
                recorder.begin(caller)

        def end(name: str, caller: str, inputs: tuple[Tensor, ...], output: Any) -> Any:
            note(name)
            if size == self.rows.size:
                recorder.end(name, caller, output)
            calls.append(Call(name, inputs, shapes_alone(output)))
            return output

        with module_hooks(replica.model, end, begin, kept=shapes_alone):
            yield
        recorder.is_open = False
        note(LOSS)
        self.ran.drawing = list(dict.fromkeys([*self.ran.drawing, *drawing]))

    def _compare_states(self, numerics: Numerics, before: tuple[Any, ...], is_whole: bool) -> None:
        """Note whether Python or NumPy drew, and as often for a micro-batch as for the batch."""
        after = other_random_state()
        self.ran.decides |= after != before
        if numerics.draws is None:
            return
        if is_whole:
            numerics.draws.others = after
        elif after != numerics.draws.others:
            self.ran.unmatched += 1


def seed_all(seed: int) -> None:
    """Seed PyTorch, Python and NumPy."""
    torch.manual_seed(seed)
    random.seed(seed)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(seed)


def _dense(gradient: Tensor) -> Tensor:
    """Return a gradient as a strided tensor; sparse embeddings have others."""
    return gradient if gradient.layout is torch.strided else gradient.to_dense()


def _hooked(replica: Replica) -> list[str]:
    """Return the names of parameters and modules with hooks that see gradients."""
    tensors = [
        name
        for name, t in replica.trained.items()
        if t._backward_hooks or t._post_accumulate_grad_hooks
    ]
    modules = replica.model.named_modules()
    return tensors + [n for n, m in modules if m._backward_hooks or m._backward_pre_hooks]


def _check(gradients: Gradients) -> None:
    largest = max(map(largest_of, gradients.values()), default=0.0)
    if not 0 < largest < float("inf"):
        raise WorkloadError(
            f"the largest gradient of the whole batch is {largest}: there is nothing to compare; "
            "pass a sample and a loss as in training"
        )
