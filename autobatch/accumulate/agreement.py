"""What the ranks of a training run agree on.

Invariant: every rank makes the same collective calls in the same order, whatever happens on one of
them. Each agreement says where in its loop a rank is, and whether it can go on. One that cannot
completes what the others wait for and says so in its next call; one that is elsewhere in its loop
is noticed; and all of them end.

A rank that gave up may go on with the next window, if its user lets it. So after an agreement that
failed, each rank makes one more: it draws a window, or says that it has left.
"""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor

from autobatch.accumulate.watch import Watch
from autobatch.errors import WorkloadError

__all__ = ["At", "Group", "OtherRankError", "Ranks", "Tally"]

_NUMBERS, _ROW = 6, 64
"""Numbers that a rank sends, and how many its row has; the rest are for the text of a failure."""

_last_call: dist.Work | None = None
"""The last collective call. Gloo's thread lets go of a call some time after it ended, and needs the
interpreter where nobody else holds its tensors: a process that ends at once, without
`destroy_process_group`, would be aborted."""


class OtherRankError(WorkloadError):
    """Another rank cannot go on, and has said so: there is no one to be told."""


class At(enum.IntEnum):
    """Where in its loop a rank is when it agrees with the others."""

    DRAWN = 1
    AVERAGE = 2
    PASSED = 3
    COMPLETE = 4
    AGAIN = 5
    UNSCALED = 6
    UPDATED = 7
    BETWEEN = 8
    LEARNED = 9
    FAILED = 10
    LEFT = 11


_PLACES = {
    At.DRAWN: "draws its next window",
    At.AVERAGE: "averages once more in the same window",
    At.PASSED: "is at the end of window.run",
    At.COMPLETE: "is at the end of its micro-batches",
    At.AGAIN: "calls window.again()",
    At.UNSCALED: "is in window.step()",
    At.UPDATED: "is in window.step()",
    At.LEARNED: "has averaged with static_graph",
    At.BETWEEN: "calls the DistributedDataParallel module between two windows",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """What one rank has drawn for a window, or what all have drawn together.

    Attributes:
        weight, samples: sums over the ranks.
        micro_batches: the most that one rank has.
        can_go_on: whether every rank has samples, or had some that it can repeat with weight 0.
    """

    weight: float
    samples: int
    micro_batches: int
    can_go_on: bool


class Ranks:
    """The processes that train one model on different samples; as it stands, a single process.

    Attributes:
        size: how many there are; gradients are averaged over them.
        alike: whether all have to run the same number of micro-batches.
        recovers: whether an OOM on one of them can be recovered.
        skips: whether one of them can leave out a micro-batch.
        shows_gradients: whether gradients are seen in `.grad` after every micro-batch.
    """

    size = 1
    alike = False
    recovers = True
    skips = True
    shows_gradients = True

    def begin(self) -> None:
        """Begin an epoch."""

    def total(self, own: Tally) -> Tally:
        """Add up what the ranks have drawn."""
        return own

    def any(self, flag: bool, at: At) -> bool:
        """Return whether the flag is set on any rank."""
        return flag

    def sums(self, *values: float) -> tuple[float, ...]:
        """Add up numbers over the ranks, at the end of a window's micro-batches."""
        return values

    def sum(self, value: Tensor) -> Tensor:
        """Add up a scalar over the ranks, without waiting for the device."""
        return value

    def give_up(self, error: BaseException, *, in_pass: bool) -> None:
        """Tell the other ranks that this one cannot go on, and why.

        `in_pass` says that gradients of the current window may not be averaged yet, for which the
        others wait. Nothing is said of an error that came from another rank.
        """

    def part(self, why: str, *, in_pass: bool) -> None:
        """Tell the other ranks, without waiting for them, that this one asks for no more windows.

        `in_pass` is as in `give_up`.
        """

    def watching(self, watch: Watch) -> contextlib.AbstractContextManager[None]:
        """Notice forward passes that prepare an average, for as long as windows are iterated.

        `watch` is told where they move gradients.
        """
        return contextlib.nullcontext()

    def averages(self, last: bool) -> bool:
        """Return whether a micro-batch's backward pass averages gradients."""
        return False

    def begin_micro_batch(self, last: bool) -> None:
        """Prepare a micro-batch, which averages gradients if it is the last of the window."""

    def end_micro_batch(self) -> None:
        """Put back what `begin_micro_batch` changed, however the micro-batch ended."""

    def open_window(self) -> None:
        """Note that all ranks have drawn a window."""

    def begin_window(self, trained: list[Tensor]) -> None:
        """Check what is averaged, and drop gradients that wait to be, outside of `.grad`.

        Also called where the micro-batches of a window run once more.

        Raises:
            UsageError: gradients of trained parameters are not averaged, or by something else.
        """

    def before_average(self) -> None:
        """Check that the backward pass that begins now averages, where it has to.

        Raises:
            WorkloadError: it does not, so that the ranks' parameters would drift apart.
        """

    def after_average(self) -> None:
        """Check that the backward pass that just ended has averaged everything.

        Raises:
            WorkloadError: it has not.
        """

    def skip(self) -> None:
        """Take part in the average of a micro-batch without a backward pass of its own."""

    def recover(self) -> bool:
        """Go on after a micro-batch that was cut short before or in its backward pass.

        Returns whether the gradients of the other ranks are spoiled, so that all of them have to
        repeat the window.
        """
        return False

    def end_window(self) -> None:
        """Note that a window has had its update, or will have none."""


class Group(Ranks):
    """The agreements of every kind of training run.

    Args:
        group: the ranks; None for all.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group
        self.size = dist.get_world_size(group)
        self._control, self._device = _control_group(group or dist.group.WORLD)
        on_cards = "nccl" in str(dist.get_backend_config(group))
        self._loss_device = torch.device("cuda" if on_cards else "cpu")
        self._failure = ""  # why this window cannot be ended, as all ranks know
        self._is_over = False  # whether a rank has left the windows

    def _agree(self, at: At, *values: float, failure: str = "") -> list[list[float]]:
        """Return the values of every rank, by rank.

        Raises:
            OtherRankError: another rank cannot go on, or is elsewhere in its loop.
        """
        if at is At.DRAWN and not self._is_over:
            self._failure = ""
        if self._failure:
            raise OtherRankError(self._failure)
        every = self._gather(self._row(at, *values, failure=failure))
        rows: list[list[float]] = torch.stack([row[:_NUMBERS] for row in every]).tolist()
        places = [At(int(row[0])) for row in rows]
        if any(place is not at or place in (At.FAILED, At.LEFT) for place in places):
            self._is_over = At.LEFT in places
            self._failure = _failure(places, every, at)
            if not failure:
                raise OtherRankError(self._failure)
        return [row[1 : 1 + len(values)] for row in rows]

    def _gather(self, mine: Tensor, *, waits: bool = True) -> list[Tensor]:
        """Send a row to the other ranks, and return the rows of all."""
        global _last_call
        every = [torch.empty_like(mine) for _ in range(self.size)]
        _last_call = dist.all_gather(every, mine, group=self._control, async_op=True)
        if waits and _last_call is not None:
            _last_call.wait()
        return every

    def _row(self, at: At, *values: float, failure: str = "") -> Tensor:
        row = torch.zeros(_ROW, dtype=torch.float64)
        row[: 1 + len(values)] = torch.tensor([at, *values], dtype=torch.float64)
        if failure:
            room = 8 * (_ROW - _NUMBERS)
            text = bytearray(failure.encode()[:room].ljust(room))
            row[_NUMBERS:] = torch.frombuffer(text, dtype=torch.float64)
        return row.to(self._device)

    def begin(self) -> None:
        """See `Ranks.begin`."""
        self._failure, self._is_over = "", False

    def total(self, own: Tally) -> Tally:
        """See `Ranks.total`."""
        mine = own.weight, own.samples, own.micro_batches, own.can_go_on
        weights, samples, counts, able = zip(*self._agree(At.DRAWN, *mine), strict=True)
        return Tally(
            weight=sum(weights),
            samples=int(sum(samples)),
            micro_batches=int(max(counts)),
            can_go_on=all(able),
        )

    def any(self, flag: bool, at: At) -> bool:
        """See `Ranks.any`."""
        return any(row[0] for row in self._agree(at, flag))

    def sums(self, *values: float) -> tuple[float, ...]:
        """See `Ranks.sums`."""
        return tuple(map(sum, zip(*self._agree(At.COMPLETE, *values), strict=True)))

    def sum(self, value: Tensor) -> Tensor:
        """See `Ranks.sum`."""
        value = value.to(self._loss_device)
        dist.all_reduce(value, group=self._group)
        return value

    def give_up(self, error: BaseException, *, in_pass: bool) -> None:
        """See `Ranks.give_up`."""
        if isinstance(error, OtherRankError) or self._failure:
            return
        if in_pass:
            self._complete()
        self._agree(At.FAILED, failure=f"{type(error).__name__}: {error}")

    def part(self, why: str, *, in_pass: bool) -> None:
        """See `Ranks.part`."""
        if self._is_over:
            return
        if in_pass and not self._failure:
            self._complete()
        self._is_over, self._failure = True, why
        with contextlib.suppress(Exception):  # the group may be gone
            self._gather(self._row(At.LEFT, failure=why), waits=False)

    def _complete(self) -> None:
        """Take part in what the others do with gradients in the current window."""


def _failure(places: Sequence[At], every: Sequence[Tensor], at: At) -> str:
    """Return why an agreement failed."""
    for rank, (place, row) in enumerate(zip(places, every, strict=True)):
        if place in (At.FAILED, At.LEFT):
            text = bytes(row[_NUMBERS:].cpu().view(torch.uint8).tolist())
            return (
                f"rank {rank} cannot go on, so this one ends too; there it was: "
                f"{text.decode(errors='ignore').strip()}"
            )
    rank, place = next((rank, place) for rank, place in enumerate(places) if place is not at)
    return (
        f"rank {rank} {_PLACES[place]}, where this one {_PLACES[at]}: all ranks have to run the "
        "same loop"
    )


@cache
def _control_group(group: dist.ProcessGroup) -> tuple[dist.ProcessGroup, torch.device]:
    """Return the group over which ranks agree, on the CPU where that is possible.

    NCCL's own calls wait for everything that runs on the card.
    """
    backends = str(dist.get_backend_config(group))
    if "nccl" not in backends or "gloo" in backends:
        return group, torch.device("cpu")
    if not dist.is_gloo_available():
        return group, torch.device("cuda")
    members = dist.get_process_group_ranks(group)
    made = dist.new_group(members, backend="gloo", use_local_synchronization=True)
    assert isinstance(made, dist.ProcessGroup)  # this rank is one of its members
    return made, torch.device("cpu")
