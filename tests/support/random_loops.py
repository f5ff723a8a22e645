"""A loop over windows on several ranks with anything left in it, and how it ends on each of them.

Used by tests/accumulate/test_rank_properties.py: `wander` runs in every rank.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from autobatch import AutobatchError, Window, windows
from tests.support.shortages import OOM, Net

MICRO = 2

INSIDE = ("before the forward", "before the backward", "after the backward")
BEFORE = "before the loop"
AFTER = ("after the loop", "after the step")
PLACES = (BEFORE, *INSIDE, *AFTER)

ANYWHERE = (
    "optimizer.zero_grad()",
    "zero_grad(set_to_none=False)",
    "optimizer.step()",
    "clipping",
    "a backward of its own",
    "a backward past the wrapper",
    "an error",
    "a shortage",
    "window.step()",
    "window.skip()",
    "window.again()",
    "leave the windows",
    "an evaluation",
)
"""What may stand at every place of a loop."""

IN_MICRO_BATCHES = (
    "a shortage in the forward",
    "a shortage in the backward",
    "leave the window",
    "no backward",
    "a forward of its own",
)
"""What only the body of the loop over micro-batches can do."""

CALLS_WRAPPER = ("a backward of its own", "a forward of its own")

CHANGES_GRADIENTS = (
    "optimizer.zero_grad()",
    "zero_grad(set_to_none=False)",
    "clipping",
    "a backward of its own",
    "a backward past the wrapper",
)
"""What is the user's own affair between the loop and the update."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Act:
    """Something that one rank, or every rank, does once.

    Attributes:
        what: of `ANYWHERE` or `IN_MICRO_BATCHES`.
        rank: which does it; None for all.
        window, index: the window, and the micro-batch in it.
        place: of `PLACES`.
    """

    what: str
    rank: int | None
    window: int
    index: int
    place: str


def can_be_promised(act: Act, options: dict[str, Any]) -> bool:
    """Whether something is covered by what windows promise.

    Gradients are the user's between the loop and the update. A backward pass through
    DistributedDataParallel on one rank alone waits for the others where no window runs. With
    `static_graph`, it learns a graph from the first backward passes, those past it included.
    """
    if options.get("static_graph") and act.what == "a backward past the wrapper":
        return act.rank is None
    if act.place == AFTER[0]:
        return act.what not in CHANGES_GRADIENTS
    return act.place in INSIDE or act.rank is None or act.what not in CALLS_WRAPPER


def _is_harmless(act: Act) -> bool:
    """Whether windows must not refuse it.

    DistributedDataParallel sends buffers in an evaluation after an update, of all ranks or none.
    """
    return act.what == "an evaluation" and (act.place in INSIDE or act.rank is None)


@dataclass(slots=True, kw_only=True)
class Record:
    """How a run ended on one rank.

    Attributes:
        end: "done", "refused" (by an AutobatchError), "left" or "own error".
        said: the error.
        acted: what was done.
        updated: the windows that had their update.
        skipped: the rows that were left out, each with its window.
        parameters: in the end, where it came to it.
    """

    end: str = "done"
    said: str = ""
    acted: list[str] = field(default_factory=list)
    updated: list[int] = field(default_factory=list)
    skipped: set[tuple[int, int]] = field(default_factory=set)
    parameters: list[Tensor] = field(default_factory=list)


class OwnError(Exception):
    """An error of the user's."""


class _LeaveError(Exception):
    """The loop over windows is to be left."""


class _Buffered(Net):
    """The network with running statistics, which DistributedDataParallel sends to all ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(16, dtype=torch.float64)  # type: ignore[assignment]


def _network(buffered: bool) -> Net:
    return (_Buffered() if buffered else Net()).eval()


def rows(rank: int, count: int) -> Tensor:
    random = torch.Generator().manual_seed(70 + rank)
    return torch.randn(count, 5, dtype=torch.float64, generator=random)


def _loss(output: Tensor) -> Tensor:
    return output.square().mean() + output.abs().mean()


class _Loop:
    """One rank's run."""

    def __init__(self, rank: int, acts: list[Act], data: Tensor, inner: Net, model: Any) -> None:
        self.rank, self.acts = rank, list(acts)
        self.inner, self.model = inner, model
        self.ids = {row: at for at, row in enumerate(data[:, 0].tolist())}
        self.record = Record()
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        self.number, self.index = 0, 0
        self.drops = self.passes_over = self.leaves = self.looks_again = False

    def rows_of(self, batch: Tensor) -> set[tuple[int, int]]:
        return {(self.number, self.ids[row]) for row in batch[:, 0].tolist()}

    def act(self, place: str, window: Window, batch: Tensor | None) -> None:
        for act in list(self.acts):
            if act.place != place or act.window != self.number or act.rank not in (None, self.rank):
                continue
            if place in INSIDE and act.index != self.index:
                continue
            self.acts.remove(act)
            self.record.acted.append(act.what)
            self.do(act.what, place, window, batch)

    def do(self, what: str, place: str, window: Window, batch: Tensor | None) -> None:
        model, optimizer = self.model, self.optimizer
        x = torch.ones(3, 5, dtype=torch.float64)
        if what == "optimizer.zero_grad()":
            optimizer.zero_grad()
        elif what == "zero_grad(set_to_none=False)":
            optimizer.zero_grad(set_to_none=False)
        elif what == "optimizer.step()":
            optimizer.step()
        elif what == "clipping":
            nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        elif what == "a backward of its own":
            _loss(model(x)).backward()
        elif what == "a backward past the wrapper":
            _loss(self.inner(x)).backward()
        elif what == "a forward of its own":
            model(x)
        elif what == "an evaluation":
            with torch.no_grad():
                model(x)
        elif what == "an error":
            raise OwnError("labels")
        elif what == "a shortage":
            raise torch.OutOfMemoryError(OOM)
        elif what.startswith("a shortage in the"):
            self.inner.fails = what.rpartition(" ")[2]
        elif what == "window.step()":
            window.step()
        elif what == "window.skip()":
            window.skip()
            if batch is not None:
                self.record.skipped |= self.rows_of(batch)
            self.drops = True
        elif what == "window.again()":
            window.again()
            self.looks_again = True
        elif what == "leave the windows":
            raise _LeaveError
        elif what == "leave the window":
            self.leaves = True
        elif what == "no backward":
            self.passes_over = True
        else:
            raise AssertionError(what)

    def forward(self, window: Window, batch: Tensor) -> Tensor | None:
        """Return the loss of a micro-batch, or None where it is skipped."""
        known = self.rows_of(batch)
        if known <= self.record.skipped:  # it comes once more
            window.skip()
            self.index += 1
            return None
        self.act(INSIDE[0], window, batch)
        loss = None
        if not known <= self.record.skipped:
            loss = _loss(self.model(batch))
            self.inner.fails = None
            self.act(INSIDE[1], window, batch)
        self.index += 1
        return None if known <= self.record.skipped else loss

    def window_by_hand(self, window: Window) -> None:
        for batch in window:
            loss = self.forward(window, batch)
            if self.leaves:
                break
            if loss is not None and not self.passes_over:
                window.backward(loss)
            self.passes_over = False
            self.index -= 1
            self.act(INSIDE[2], window, batch)
            self.index += 1
            if self.leaves:
                break
        if self.leaves:
            self.leaves, self.drops = False, True
            window.skip()

    def pass_over(self, window: Window, function: bool) -> None:
        self.index = 0
        if function:
            window.run(lambda batch: self.forward(window, batch))  # type: ignore[arg-type,return-value]
        else:
            self.window_by_hand(window)

    def run(self, run: Any, function: bool) -> None:
        for self.number, window in enumerate(run):
            self.drops = False
            self.act(BEFORE, window, None)
            if not window.stepped:
                self.pass_over(window, function)
            if not window.stepped:
                self.drops = False
                self.act(AFTER[0], window, None)
                if self.looks_again:
                    self.looks_again = False
                    self.pass_over(window, function)
                if not self.drops and not window.stepped:
                    window.step()
            if not window.skipped:
                self.record.updated.append(self.number)
            self.act(AFTER[1], window, None)


def wander(
    rank: int,
    *,
    kind: str,
    acts: list[Act],
    counts: list[int],
    steps: int,
    function: bool,
    buffered: bool = False,
    options: dict[str, Any] | None = None,
) -> str:
    """Run the loop on this rank; say what is wrong with how it ended, or "".

    Args:
        kind: "ddp" or "fsdp".
        acts: what is left in the loop.
        counts: samples of each rank.
        steps: micro-batches of a window.
        function: whether the loop is `window.run`.
        buffered: whether the network has buffers.
        options: of DistributedDataParallel.
    """
    inner, reference = _network(buffered), _network(buffered)
    model = _wrapped(inner, kind, options or {})
    data = rows(rank, counts[rank])
    loop = _Loop(rank, acts, data, inner, model)
    record = loop.record
    run = windows(
        data.split(MICRO), loop.optimizer, micro_batch=MICRO, accumulation_steps=steps, model=model
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            loop.run(run, function)
        except AutobatchError as error:
            record.end, record.said = "refused", f"{type(error).__name__}: {error}"
        except (OwnError, torch.OutOfMemoryError) as error:
            record.end, record.said = "own error", repr(error)
        except _LeaveError:
            record.end = "left"
    record.parameters = [_whole(p) for p in model.parameters()] if record.end == "done" else []
    # whatever happened, nothing may be left in the ranks' channels that this would take for its own
    every: list[Any] = [None] * len(counts)
    dist.all_gather_object(every, record)
    return _judged(every, reference, counts, steps, acts)


def _wrapped(model: nn.Module, kind: str, options: dict[str, Any]) -> Any:
    if kind == "ddp":
        # a bucket for every parameter or two, so that a backward pass can end between them
        return DistributedDataParallel(model, bucket_cap_mb=0.0001, **options)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))


def _whole(tensor: Any) -> Tensor:
    full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.detach().clone()


def _judged(
    every: list[Record], reference: nn.Module, counts: list[int], steps: int, acts: list[Act]
) -> str:
    said = "; ".join(f"rank {r}: {e.end} {e.said} {e.acted}" for r, e in enumerate(every))
    ends = {record.end for record in every}
    if ends - {"done"}:
        if "done" in ends:
            return f"a rank went on without the others: {said}"
        if not any(record.acted for record in every) or all(map(_is_harmless, acts)):
            return f"a false alarm: {said}"
        return ""
    first = every[0]
    for record in every[1:]:
        if record.updated != first.updated:
            return f"the ranks updated in different windows: {said}"
        pairs = zip(record.parameters, first.parameters, strict=True)
        if not all(torch.equal(a, b) for a, b in pairs):
            return f"the ranks' parameters differ: {said}"
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1, momentum=0.9)
    size = MICRO * steps
    for number in range(math.ceil(max(counts) / size)):
        kept = [
            rows(rank, count)[at]
            for rank, count in enumerate(counts)
            for at in range(number * size, min(count, (number + 1) * size))
            if (number, at) not in every[rank].skipped
        ]
        if (number in first.updated) != bool(kept) and number in first.updated:
            return f"an update of no samples: {said}"
        if number in first.updated:
            optimizer.zero_grad()
            _loss(reference(torch.stack(kept))).backward()
            optimizer.step()
    pairs = zip(first.parameters, reference.parameters(), strict=True)
    off = max(float((a - b).detach().abs().max()) for a, b in pairs)
    return f"off by {off}: {said}" if off > 1e-12 else ""
