"""A GPU that is not in the machine: the user's own code on fake tensors, in seconds.

Forward and backward run through PyTorch's real autograd engine and optimizers; only kernels and
memory are missing. Invariant: the user's model, optimizer and random states are as before.
"""

from __future__ import annotations

import contextlib
import re
import time
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import nn

from autobatch.devices.base import WINDOWS, Run
from autobatch.devices.copies import Copier
from autobatch.devices.one_card import require_one_card
from autobatch.devices.preserve import kernel_switches, process_state_preserved
from autobatch.devices.session import Session, user_errors
from autobatch.devices.virtual.ahead import Task, taken
from autobatch.devices.virtual.backend import emulated_cuda, virtual_device
from autobatch.devices.virtual.compiled_functions import compiled_functions_fused
from autobatch.devices.virtual.device_guard import lost_errors_found
from autobatch.devices.virtual.fake_mode import VirtualMode
from autobatch.devices.virtual.function_mode import CudaCalls
from autobatch.devices.virtual.guesses import Guesses
from autobatch.devices.virtual.kernels import outputs
from autobatch.devices.virtual.kernels.calls import Hashed
from autobatch.devices.virtual.kernels.cuda_functions import cuda_kernels
from autobatch.devices.virtual.kernels.rnn import flatten_weights
from autobatch.devices.virtual.kernels.triton_launches import triton_skipped
from autobatch.devices.virtual.kernels.workspaces import Workspaces
from autobatch.devices.virtual.known_values import KnownValues
from autobatch.devices.virtual.leftovers import leftovers_removed
from autobatch.devices.virtual.questions import Question, note_question, questions
from autobatch.devices.virtual.recorder import StorageRecorder
from autobatch.devices.virtual.unknown_values import UnknownValues
from autobatch.devices.virtual.work import WorkCounter, counting
from autobatch.devices.warnings import too_large_unsharded
from autobatch.errors import WorkloadError
from autobatch.gpus.catalogue import GpuSpec
from autobatch.gpus.uncertainty import SIMULATED_HEADROOM
from autobatch.gpus.work import WindowWork
from autobatch.memory.accounting import activity_bytes, replay
from autobatch.memory.allocator import CachingAllocator
from autobatch.memory.allocator_settings import AllocatorSettings
from autobatch.memory.trace import Trace
from autobatch.records.footprint import Evidence
from autobatch.support.interrupts import held
from autobatch.support.oom import let_go
from autobatch.support.wording import count
from autobatch.workload.counts import ModelCounts
from autobatch.workload.workload import Workload
from autobatch.workload.wrappers import is_compiled, unwrapped

__all__ = ["VirtualGpu", "identity_of"]

Shard = Callable[[nn.Module, Workload, Any, contextlib.ExitStack], tuple[nn.Module, list[str]]]

_WITHOUT_CUDA = (AttributeError, TypeError, NotImplementedError, AssertionError, KeyError)
"""What code raises that is not prepared for CUDA."""


class VirtualGpu:
    """Runs workloads on a simulated GPU."""

    evidence: Evidence = "simulated"
    is_simulated = True
    default_headroom = SIMULATED_HEADROOM
    scratch_varies = False
    must_run_the_plan = False

    def __init__(
        self,
        spec: GpuSpec,
        settings: AllocatorSettings | None = None,
        *,
        counts_work: bool = False,
    ):
        """Simulate the card that `spec` describes.

        Args:
            spec: the card.
            settings: of the caching allocator; None reads the environment, as PyTorch does.
            counts_work: whether runs tell the FLOPs and bytes of their last window.
        """
        self.spec = spec
        self._counts_work = counts_work
        self.usable_bytes = spec.capacity_bytes - spec.context_bytes
        self.others_bytes = 0
        self.allowed_bytes = None
        self._settings = AllocatorSettings.of_environment() if settings is None else settings
        self._known_layouts: dict[Any, Any] = {}
        self._guesses: dict[int, tuple[Guesses, nn.Module]] = {}  # a model keeps its id

    def require(self, workload: Workload) -> None:
        """Accept every workload."""

    def host_limit_bytes(self) -> int | None:
        """Return None: fake tensors take no memory."""
        return None

    def simulated(self) -> VirtualGpu:
        """Return itself: this is a simulated card."""
        return self

    def allocator(self) -> CachingAllocator:
        """Return an allocator that holds nothing yet."""
        return CachingAllocator(self._settings)

    @contextlib.contextmanager
    def hosting(self, workload: Workload) -> Iterator[None]:
        """Do nothing: no memory of the user's is in the way."""
        yield

    def labelled(self, workload: Workload, trace: Trace) -> Trace:
        """Return the trace: runs are labelled here."""
        return trace

    def notes(self) -> tuple[str, ...]:
        """Return nothing: no other process is on a simulated card."""
        return ()

    def run(
        self,
        workload: Workload,
        *,
        micro_batch: int,
        accumulation_steps: int,
        windows: int = WINDOWS,
    ) -> Run:
        """Run training windows of `accumulation_steps` micro-batches without a GPU.

        Raises:
            WorkloadError: the user's model, loss or optimizer failed; the cause is chained.
        """
        found = taken(self._key(workload, micro_batch, accumulation_steps, windows))
        if found is not None:
            ran, asked = found
            for question in asked:
                note_question(question, None)
            return ran  # type: ignore[no-any-return]
        return self._run_here(workload, micro_batch, accumulation_steps, windows)

    def foreseen(
        self, workload: Workload, micro_batches: Iterable[int], accumulation_steps: int
    ) -> list[Task]:
        """Return tasks for helpers: runs of a workload that are likely to be asked for."""
        return [
            (
                self._key(workload, size, accumulation_steps, WINDOWS),
                partial(self._run_ahead, workload, size, accumulation_steps),
            )
            for size in micro_batches
        ]

    def _run_ahead(
        self, workload: Workload, micro_batch: int, accumulation_steps: int
    ) -> tuple[Run, set[Question]] | None:
        """Return a run and what it asked; None where values decided something in it.

        What is learned of values stays in the process that learns it.
        """
        with questions() as asked:
            ran = self._run_here(workload, micro_batch, accumulation_steps, WINDOWS)
        return (ran, asked) if self._guesses_of(workload).is_unused else None

    def _key(
        self, workload: Workload, micro_batch: int, accumulation_steps: int, windows: int
    ) -> Hashable:
        """Return what is the same for runs that are alike."""
        return (
            (Hashed(self.spec), repr(self._settings)),
            identity_of(workload),
            (micro_batch, accumulation_steps, windows),
            (self._counts_work, kernel_switches()),
        )

    def _recipes(self) -> dict[Any, Any]:
        """Return the cache of output layouts that a run here begins with, and adds to."""
        return self._known_layouts

    def _guesses_of(self, workload: Workload) -> Guesses:
        return self._guesses.setdefault(id(workload.model), (Guesses(), workload.model))[0]

    def _run_here(
        self, workload: Workload, micro_batch: int, accumulation_steps: int, windows: int
    ) -> Run:
        """Run in this process."""
        _require_eager(workload.model)
        require_one_card(workload.model)
        guesses = self._guesses_of(workload)
        job = _Job(workload, micro_batch, accumulation_steps, windows, guesses)
        first: WorkloadError | None = None
        while True:
            guesses.begin()
            try:
                ran = self._simulated(job)
            except WorkloadError as error:
                if error.__cause__ is None or isinstance(error.__cause__, WorkloadError):
                    raise
                first = first or error
                if not guesses.turn(error.__cause__):
                    raise first from first.__cause__
            else:
                if not guesses.learned():
                    return self._heaviest(job, ran)

    def _heaviest(self, job: _Job, ran: Run) -> Run:
        """Run again where code branched on values that are not known; return what needs most."""
        most = activity_bytes(ran.trace)
        for settle in job.guesses.branches():
            try:
                other = self._simulated(job)
            except WorkloadError:  # no branch that training takes
                settle(False)
                continue
            needed = activity_bytes(other.trace)
            settle(needed > most)
            if needed > most:
                ran, most = other, needed
        return ran

    def _simulated(self, job: _Job) -> Run:
        """Run once, under what is assumed of values."""
        is_sharded = job.workload.is_sharded
        if not is_sharded:
            try:
                return self._run(job, StorageRecorder())
            except WorkloadError as error:
                if job.workload.world_size == 1 or not _asks_for_a_group(error.__cause__):
                    raise
        from autobatch.devices.virtual.sharding.dtensor_mode import rank_mode
        from autobatch.devices.virtual.sharding.policy import shard
        from autobatch.devices.virtual.sharding.rank import as_rank_zero

        with as_rank_zero(job.workload.world_size, virtual_device()) as recorder:
            return self._run(job, recorder, rank_mode(), shard if is_sharded else None)

    def _run(
        self,
        job: _Job,
        recorder: StorageRecorder,
        mode_class: type[VirtualMode] = VirtualMode,
        shard: Shard | None = None,
    ) -> Run:
        """Run as one process whose storages `recorder` sees and whose ops `mode_class` answers.

        `shard` shares the copied model out, and returns what runs, and notes for the user.
        """
        started = time.perf_counter()
        modes: list[weakref.ref[VirtualMode]] = []
        with process_state_preserved(), held():
            try:
                ran = self._windows(job, recorder, mode_class, shard, modes)
            except WorkloadError as error:
                let_go(error)
                if removed := [note for mode in modes for note in leftovers_removed(mode)]:
                    raise type(error)("; ".join((str(error), *removed))) from error.__cause__
                raise
            notes = [*ran.notes, *leftovers_removed(modes[0])]
        if ran.adopted:
            notes.append(
                f"{count(ran.adopted, 'tensor')} on the CPU met tensors on the GPU: taken to be "
                "there too; on a real GPU, move them first"
            )
        if is_compiled(job.workload.model):
            notes.append(
                "the model is compiled; it was simulated through its eager original, and compiled "
                "kernels usually need less memory"
            )
        return Run(
            trace=ran.trace,
            replay=replay(ran.trace, self.allocator()),
            seconds=time.perf_counter() - started,
            loss=ran.loss,
            loss_code=ran.loss_code,
            optimizer=ran.optimizer,
            grown_bytes=ran.grown_bytes,
            notes=tuple(notes),
            work=ran.work,
            counts=ran.counts,
        )

    def _windows(
        self,
        job: _Job,
        recorder: StorageRecorder,
        mode_class: type[VirtualMode],
        shard: Shard | None,
        modes: list[weakref.ref[VirtualMode]],
    ) -> _Ran:
        """Run the windows; nothing of the simulation is held afterwards.

        `modes` gets the mode of the simulation, to which each of its tensors refers.
        """
        device = virtual_device()
        workload, guesses = job.workload, job.guesses
        notes: list[str] = []
        values = KnownValues(job.micro_batch)
        unknown = UnknownValues(values, outputs.RULES, guesses)
        workspaces = Workspaces(recorder, self.spec, device)
        copier = Copier(device, values.blank)
        counter = None
        if self._counts_work:
            counter = WorkCounter(recorder, device, workload.world_size, job.windows)
        mode = (mode_class if counter is None else counting(mode_class, counter))(
            device, recorder, unknown, workspaces, copier.move, copier.is_copy, self._recipes()
        )
        modes.append(weakref.ref(mode))
        calls = CudaCalls(device, guesses)
        original = unwrapped(workload.model)
        with (
            contextlib.closing(copier),
            contextlib.ExitStack() as afterwards,
            compiled_functions_fused(recorder),
            emulated_cuda(self.spec, device),
            torch.compiler.set_stance("force_eager"),
            # an autograd engine that ran before the registration has no thread for our device
            torch.autograd.set_multithreading_enabled(False),
            cuda_kernels(device, self.spec.compute_capability, recorder),
            triton_skipped(self.spec.compute_capability),
            mode,
            calls,
            calls.in_backward(),
            calls.shown_as_cuda(mode),
            _explained(calls),
            user_errors(workload, job.micro_batch),
            lost_errors_found(),
        ):

            def wrapped(copied: nn.Module) -> nn.Module:
                flatten_weights(copied, device)
                if shard is not None:
                    tensors = [*original.parameters(), *original.buffers()]
                    if not all(tensor.is_meta for tensor in tensors):
                        whole = sum(tensor.nbytes for tensor in copied.parameters())
                        spec = self.spec
                        notes.extend(too_large_unsharded(whole, self.usable_bytes, spec.name))
                    policy = copier.any(workload.sharding)
                    copied, more = shard(copied, workload, policy, afterwards)
                    notes.extend(more)
                return copied

            session = Session(workload, original, device, copier, recorder, wrapped)
            afterwards.callback(session.let_go)
            if counter is not None:
                afterwards.enter_context(counter.following(session.buckets))
            session.train(job.micro_batch, job.accumulation_steps, windows=job.windows)
        notes += [*session.notes, *unknown.notes(), *guesses.notes()]
        if calls.arrays:
            notes.append(
                "NumPy read values that are not known on a simulated GPU: every element was a "
                "placeholder, and what the code chose by them (a matching, say) may be another"
            )
        recorder.parts = unknown.parts
        return _Ran(
            trace=recorder.trace(job.micro_batch, job.accumulation_steps),
            notes=notes,
            adopted=mode.adopted,
            loss=session.loss_kind,
            loss_code=session.loss_code,
            optimizer=session.optimizer_name,
            grown_bytes=session.grown_bytes,
            work=None if counter is None else counter.work(job.micro_batch),
            counts=session.counts,
        )


def identity_of(workload: Workload) -> Hashable:
    """Return a key that is equal where workloads execute alike; notes and levers do not count."""
    told = ("notes", "levers")
    return tuple(
        id(getattr(workload, each.name)) for each in fields(workload) if each.name not in told
    )


@dataclass(frozen=True, slots=True)
class _Job:
    """What is run, and what is assumed of values in it."""

    workload: Workload
    micro_batch: int
    accumulation_steps: int
    windows: int
    guesses: Guesses


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ran:
    """What windows tell when they have run through.

    Attributes:
        trace: as it was while the model and the optimizer were alive.
        notes: what the user should know.
        adopted: tensors that the user left on the CPU, and that were used on the GPU.
        loss, loss_code: how it was obtained, as in `Run`.
        optimizer: its class.
        grown_bytes: as in `Run`.
        work, counts: as in `Run`.
    """

    trace: Trace
    notes: list[str]
    adopted: int
    loss: str
    loss_code: str | None
    optimizer: str
    grown_bytes: int
    work: WindowWork | None
    counts: ModelCounts | None


_OP_OF_OPS = re.compile(r"no rule registered for HigherOrderOperator (\w+)")
"""What PyTorch says of `torch.cond`, `flex_attention` and their like on fake tensors."""


@contextlib.contextmanager
def _explained(calls: CudaCalls) -> Iterator[None]:
    """Say what an error comes from: an op of ops, or that the code asked for CUDA."""
    try:
        yield
    except WorkloadError as error:
        if called := _OP_OF_OPS.search(str(error.__cause__)):
            what, _, _ = str(error).partition(": ")
            raise WorkloadError(
                f"{what}: {called[1]} runs functions as one op and cannot be simulated; what it "
                "does, written in ordinary ops, can"
            ) from error.__cause__
        if calls.asked and isinstance(error.__cause__, _WITHOUT_CUDA):
            raise WorkloadError(
                f"{error}. The code asked whether a tensor is on CUDA; if the model looks at "
                "torch.cuda.is_available() when it is built, pass a function that builds it as "
                "the model: it is called with the card there"
            ) from error.__cause__
        raise


def _asks_for_a_group(cause: BaseException | None) -> bool:
    """Whether code needs a process group, as an optimizer does whose states are shared out."""
    return "process group has not been initialized" in str(cause)


def _require_eager(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise WorkloadError(
                f"{f'{name} of the model' if name else 'the model'} is a torch.jit module, which "
                "cannot be simulated: pass the module that it was scripted or traced from"
            )
