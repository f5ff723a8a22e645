"""What the ranks of tests/accumulate/test_rank_loops.py run: loops with mistakes, failing ranks."""

from __future__ import annotations

import contextlib
import copy
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from autobatch import AutobatchError, Window, windows
from tests.support.shortages import OOM

Result = dict[str, Any]
STEPS = 3


def network(norm: type[nn.Module] = nn.BatchNorm1d) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), norm(6), nn.Tanh(), nn.Linear(6, 2)).double()


def data(rank: int) -> Tensor:
    random = torch.Generator().manual_seed(40 + rank)
    return torch.randn(24, 5, dtype=torch.float64, generator=random)


def _plain(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


# -- how a micro-batch calls its losses: by name, on one rank's wrapper

Loop = Callable[[Window, Any, Tensor], None]


def _whole(window: Window, model: Any, batch: Tensor) -> None:
    window.backward(_plain(model, batch))


def _bypassed(window: Window, model: Any, batch: Tensor) -> None:
    window.backward(_plain(model.module, batch))


def _two_after_two(window: Window, model: Any, batch: Tensor) -> None:
    one, two = _plain(model, batch), model(batch).abs().mean()
    window.backward(one)
    window.backward(two)


def _one_by_one(window: Window, model: Any, batch: Tensor) -> None:
    window.backward(_plain(model, batch))
    window.backward(model(batch).abs().mean())


def _added_up(window: Window, model: Any, batch: Tensor) -> None:
    window.backward(_plain(model, batch) + model(batch).abs().mean())


def _after_a_look(window: Window, model: Any, batch: Tensor) -> None:
    """A forward pass without gradients prepares no average."""
    loss = _plain(model.module, batch)
    with torch.no_grad():
        model(batch)
    window.backward(loss)


LOOPS: dict[str, tuple[Loop, bool]] = {
    "whole": (_whole, False),
    "bypassed": (_bypassed, False),
    "two after two": (_two_after_two, True),
    "one by one": (_one_by_one, True),
    "added up": (_added_up, True),
    "after a look": (_after_a_look, False),
}


def train(
    rank: int, *, loop: str, function: bool = False, evaluation: bool = False, **options: Any
) -> Result:
    """Two windows; how far the parameters are from those of the whole batch, or the refusal."""
    body, is_double = LOOPS[loop]
    model, reference = network(nn.LayerNorm), network(nn.LayerNorm)
    wrapped = DistributedDataParallel(model, **options)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    run = windows(
        data(rank).split(4), optimizer, micro_batch=4, accumulation_steps=STEPS, model=wrapped
    )
    try:
        for window in run:
            if function:
                window.run(lambda batch: _plain(wrapped, batch))
            else:
                for batch in window:
                    body(window, wrapped, batch)
            window.step()
            if evaluation:
                with torch.no_grad():
                    wrapped(data(rank)[:4])
    except AutobatchError as error:
        return {"refused": str(error)}
    everyone = [data(other) for other in range(dist.get_world_size())]
    other = torch.optim.SGD(reference.parameters(), lr=0.1)
    for at in range(0, 24, 4 * STEPS):
        batch = torch.cat([part[at : at + 4 * STEPS] for part in everyone])
        loss = _plain(reference, batch)
        if is_double:
            loss = loss + reference(batch).abs().mean()
        other.zero_grad()
        loss.backward()
        other.step()
    return {"off": _apart(model, reference)}


def _apart(left: nn.Module, right: nn.Module) -> float:
    pairs = zip(left.parameters(), right.parameters(), strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


# -- skipping


def skip(rank: int, *, skipped: dict[int, tuple[int, ...]], called: bool) -> Result:
    """Leave out micro-batches of ranks, before or after the forward pass."""
    model, reference = network().eval(), network().eval()
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    run = windows(
        data(rank).split(4), optimizer, micro_batch=4, accumulation_steps=STEPS, model=wrapped
    )
    samples, losses, at = [], [], 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for window in run:
            for batch in window:
                if at in skipped.get(rank, ()):
                    if called:
                        wrapped(batch)
                    window.skip()
                else:
                    window.backward(_plain(wrapped, batch))
                at += 1
            window.step()
            samples.append(window.samples)
            losses.append(float("nan") if window.skipped else window.loss.item())
    other = torch.optim.SGD(reference.parameters(), lr=0.1)
    expected = []
    for number in range(2):
        parts = [
            data(r).split(4)[at]
            for r in range(dist.get_world_size())
            for at in range(number * STEPS, (number + 1) * STEPS)
            if at not in skipped.get(r, ())
        ]
        if not parts:
            continue
        other.zero_grad()
        loss = _plain(reference, torch.cat(parts))
        loss.backward()
        expected.append(loss.item())
        other.step()
    return {
        "off": _apart(model, reference),
        "samples": samples,
        "losses": losses,
        "expected": expected,
    }


# -- a rank that cannot go on


class _Short(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:
        raise torch.OutOfMemoryError(OOM)


def give_up(rank: int, *, why: str, place: int, kind: str = "ddp") -> Result:
    """Rank 0 fails; the others have to end with its reason, and none may wait."""
    model = network().eval() if kind == "ddp" else nn.Linear(5, 2).double()
    wrapped = DistributedDataParallel(model) if kind == "ddp" else _sharded(model)
    kind_of = _Short if why == "update" and rank == 0 else torch.optim.SGD
    optimizer = kind_of(wrapped.parameters(), lr=0.1)
    seen = [0]

    def weight(batch: Tensor) -> float:
        return -1.0 if why == "weight" and rank == 0 else float(len(batch))

    def loss(batch: Tensor) -> Tensor:
        seen[0] += 1
        fails = rank == 0 and seen[0] > place
        if fails and why == "shortage before":
            raise torch.OutOfMemoryError(OOM)
        if fails and why == "bug before":
            raise KeyError("labels")
        output = wrapped(batch)
        if fails and why == "shortage after":
            raise torch.OutOfMemoryError(OOM)
        if fails and why == "bug after":
            raise KeyError("labels")
        return output.square().mean()

    loader: Any = data(rank).split(4)
    if why == "loader" and rank == 0:
        loader = _breaks(loader)
    started, said = time.monotonic(), "went on"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for window in windows(
                loader, optimizer, micro_batch=4, accumulation_steps=STEPS, model=wrapped,
                weight=weight,
            ):  # fmt: skip
                window.run(loss)
                window.step()
        except (AutobatchError, KeyError, OSError) as error:
            said = f"{type(error).__name__}: {error}"
    return {"said": said, "seconds": time.monotonic() - started}


def _breaks(batches: Any) -> Any:
    yield from batches[:STEPS]
    raise OSError("the disk is gone")


def _sharded(model: nn.Module) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))


def around(rank: int, *, how: str) -> str:
    """Train under DDP with something of the user's around it; say how that ends."""
    model: Any = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    extra = nn.Linear(3, 3).double()
    if how in ("unfrozen before", "unfrozen between"):
        model[0].requires_grad_(False)
    wrapped = DistributedDataParallel(model)
    if how == "unfrozen before":
        model[0].requires_grad_(True)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    silent = wrapped.no_sync() if how == "no_sync" else contextlib.nullcontext()
    try:
        run = windows(
            data(rank).split(4), optimizer, micro_batch=4, accumulation_steps=STEPS, model=wrapped
        )
        with silent:
            for number, window in enumerate(run):
                for at, batch in enumerate(window):
                    if how == "one rank breaks" and rank == 0:
                        break
                    if how == "no backward" and rank == 0 and at == 1:
                        continue
                    last = how == "unreached" and at == STEPS - 1
                    output = wrapped(batch)
                    window.backward((output * 0 + 1).sum() if last else output.square().mean())
                    if how == "one rank breaks late" and rank == 0 and at == STEPS - 1:
                        break
                    if last or (how == "frozen" and at == 0):
                        model[0].requires_grad_(False)
                if how.startswith("one rank breaks") and rank == 0:
                    window.skip()
                    return "left"
                window.step()
                if how == "unfrozen between":
                    model[0].requires_grad_(True)
                if how == "group added" and not number:
                    optimizer.add_param_group({"params": list(extra.parameters())})
    except AutobatchError as error:
        return str(error)
    return "went on"


def shards(rank: int, *, how: str) -> Result:
    """Train under FSDP2 with something of the user's in between; how far the shards are off."""
    torch.manual_seed(0)
    model: Any = nn.Linear(5, 3).double()
    reference = copy.deepcopy(model)
    wrapped = _sharded(model)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    if how == "divided":
        wrapped.set_gradient_divide_factor(3.0)
    kept = range(2)
    try:
        for number, window in enumerate(
            windows(
                data(rank).split(4), optimizer, micro_batch=4, accumulation_steps=3, model=wrapped
            )
        ):
            if how == "left" and not number:
                kept = range(1, 2)
                for batch in window:
                    window.backward(_plain(wrapped, batch))
                    break
                with contextlib.suppress(AutobatchError):
                    window.skip()
                break
            for batch in window:
                if how == "settings":
                    wrapped.set_requires_gradient_sync(False)
                    wrapped.set_is_last_backward(False)
                window.backward(_plain(wrapped, batch))
            window.step()
        if how == "left":
            rest = windows(
                data(rank).split(4)[3:], optimizer, micro_batch=4, accumulation_steps=3,
                model=wrapped,
            )  # fmt: skip
            for window in rest:
                window.run(lambda batch: _plain(wrapped, batch))
                window.step()
    except AutobatchError as error:
        return {"refused": str(error)}
    other = torch.optim.SGD(reference.parameters(), lr=0.1)
    for at in kept:
        everyone = [data(r)[12 * at : 12 * at + 12] for r in range(dist.get_world_size())]
        other.zero_grad()
        _plain(reference, torch.cat(everyone)).backward()
        other.step()
    pairs = zip(wrapped.parameters(), reference.parameters(), strict=True)
    return {"off": max(float((a.full_tensor() - b).detach().abs().max()) for a, b in pairs)}


# -- models of which a part is averaged


def partly(rank: int, *, how: str) -> str:
    """Ask for windows of a model whose wrapper leaves some trained parameters alone."""
    model: Any = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)).double()
    extra = nn.Linear(3, 1).double()
    trained = [*model.parameters()]
    if how == "ignored":
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["0.weight"])
        model = DistributedDataParallel(model)
    elif how == "of a loss":
        trained += extra.parameters()
        model = DistributedDataParallel(model)
    elif how == "one layer sharded":
        _sharded(model[1])
        trained = [*model.parameters()]
    elif how == "frozen":
        extra.requires_grad_(False)
        trained += extra.parameters()
        model = DistributedDataParallel(model)
    try:
        windows(
            [], torch.optim.SGD(trained, lr=0.1), micro_batch=1, accumulation_steps=1, model=model
        )
    except AutobatchError as error:
        return str(error)
    return "accepted"


def norm(rank: int) -> Result:
    """The norm under FSDP2, beside that of the whole gradient."""
    torch.manual_seed(0)
    model: Any = nn.Linear(5, 3).double()
    reference = copy.deepcopy(model)
    wrapped = _sharded(model)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    for window in windows(
        [data(0)[:12]], optimizer, micro_batch=6, accumulation_steps=2, model=wrapped, clip_norm=0.1
    ):
        window.run(lambda batch: wrapped(batch).square().mean())
        window.step()
    reference(data(0)[:12]).square().mean().backward()
    expected = torch.nn.utils.get_total_norm([p.grad for p in reference.parameters()])
    return {"said": f"{window.grad_norm:.6f}", "expected": f"{expected:.6f}"}
