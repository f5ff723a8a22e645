"""What the ranks of tests/accumulate/test_ranks.py run; each returns tensors and numbers."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from autobatch import UsageError, windows
from tests.support.shortages import MICRO_BATCH, STEPS, Net, Stumble, data, optimizer_of, train

Result = dict[str, Any]


def _wrapped(model: nn.Module, kind: str, **options: Any) -> nn.Module:
    if kind == "ddp":
        # a bucket for every parameter or two, so that a backward pass can end between them
        return DistributedDataParallel(model, bucket_cap_mb=0.0001, **options)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in list(model.children()):
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def _whole(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.detach().clone()


class _Watched(torch.optim.SGD):
    def __init__(self, model: nn.Module, lr: float = 0.1) -> None:
        super().__init__(model.parameters(), lr=lr)
        self.seen: list[list[Tensor]] = []

    def step(self, closure: Any = None) -> Any:
        self.seen.append([_whole(p.grad) for g in self.param_groups for p in g["params"]])
        return super().step(closure)


def accumulate(
    rank: int, *, kind: str, counts: list[list[int]], steps: int, sync: Any = None
) -> Result:
    """Micro-batches of 2 samples with so many labelled tokens each, by rank."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    full = copy.deepcopy(model)
    wrapped = _wrapped(model, kind)
    everyone = [
        [_token_batch(n, 100 * r + i) for i, n in enumerate(c)] for r, c in enumerate(counts)
    ]
    optimizer = _Watched(wrapped)
    run = windows(
        everyone[rank],
        optimizer,
        micro_batch=2,
        accumulation_steps=steps,
        model=wrapped,
        weight=_tokens,
        sync=sync,
    )
    losses, samples = [], []
    for window in run:
        for batch in window:
            window.backward(_token_loss(wrapped, batch))
        window.step()
        losses.append(window.loss.item())
        samples.append(window.samples)
    reference = _Watched(full)
    expected_losses = []
    for at in range(math.ceil(max(map(len, counts)) / steps)):
        parts = [b for batches in everyone for b in batches[at * steps : (at + 1) * steps]]
        whole = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
        if not _tokens(whole):
            continue  # such a window is left out
        loss = _token_loss(full, whole)
        loss.backward()
        reference.step()
        reference.zero_grad()
        expected_losses.append(loss.item())
    return {
        "seen": optimizer.seen,
        "expected": reference.seen,
        "losses": losses,
        "expected_losses": expected_losses,
        "samples": samples,
    }


def _token_batch(count: int, seed: int) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    labels = torch.full((12,), -100)
    labels[torch.randperm(12, generator=random)[:count]] = 1
    x = torch.randn(2, 6, 5, dtype=torch.float64, generator=random)
    return {"x": x, "labels": labels.view(2, 6)}


def _tokens(batch: dict[str, Tensor]) -> Tensor:
    return (batch["labels"] != -100).sum()


def _token_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(
        model(batch["x"]).flatten(0, 1), batch["labels"].flatten(), ignore_index=-100
    )


def naive_ranks(rank: int, *, counts: list[int]) -> Result:
    """Each rank divides by its own tokens, and DDP averages the ranks."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    wrapped = _wrapped(model, "ddp")
    _token_loss(wrapped, _token_batch(counts[rank], 100 * rank)).backward()
    return {"seen": [_whole(p.grad) for p in model.parameters()]}


class _Counted:
    """Count how often DDP averages buckets, by a communication hook."""

    def __init__(self, model: DistributedDataParallel) -> None:
        self.buckets = 0

        def hook(_, bucket):  # type: ignore[no-untyped-def]  # DDP reads annotations
            self.buckets += 1
            return (
                dist.all_reduce(bucket.buffer(), async_op=True)
                .get_future()
                .then(lambda future: future.value()[0] / dist.get_world_size())
            )

        model.register_comm_hook(None, hook)


def count_averages(rank: int, *, how: str) -> Result:
    """Buckets averaged in two windows of three micro-batches after a first one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)).double()
    wrapped = DistributedDataParallel(model)
    counted = _Counted(wrapped)
    optimizer = _Watched(wrapped)
    batches = data(rank, 36).split(4)
    if how == "windows":
        run = windows(batches, optimizer, micro_batch=4, accumulation_steps=3, model=wrapped)
        for window in run:
            for x in window:
                window.backward(wrapped(x).square().mean())
            window.step()
    else:
        for step, x in enumerate(batches):
            last = step % 3 == 2
            if how == "backward only":
                loss = wrapped(x).square().mean() / 3
                with wrapped.no_sync() if not last else _nothing():
                    loss.backward()
            elif how == "off by one":
                with wrapped.no_sync() if step % 3 != 1 else _nothing():
                    (wrapped(x).square().mean() / 3).backward()
            if last:
                optimizer.step()
                optimizer.zero_grad()
    return {"buckets": counted.buckets, "seen": optimizer.seen}


def _nothing() -> Any:
    import contextlib

    return contextlib.nullcontext()


def recover(
    rank: int,
    *,
    place: str | None,
    window: int = 0,
    index: int = 0,
    times: int = 1,
    ranks: tuple[int, ...] = (0,),
    optimizer: str = "adamw",
    steps: int = STEPS,
    **options: Any,
) -> Result:
    """Ten windows of which one runs out of memory on the given ranks."""
    model = Net()
    wrapped = _wrapped(model, "ddp")
    updates = optimizer_of(optimizer, wrapped)
    run = windows(
        data(rank).split(MICRO_BATCH)[: 10 * steps],
        updates,
        micro_batch=MICRO_BATCH,
        accumulation_steps=steps,
        clip_norm=1.0,
        model=wrapped,
        **options,
    )
    stumble = Stumble(place if rank in ranks else None, window, index, times)
    losses: list[float] = []
    said = train(wrapped, model, run, updates, stumble, lambda w: losses.append(w.loss.item()))
    return {
        "parameters": [_whole(p) for p in model.parameters()],
        "shortages": stumble.shortages,
        "said": said,
        "losses": losses,
    }


def uneven(rank: int, *, kind: str) -> Result:
    """One rank has half as many micro-batches as the other, in the last window."""
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)).double()
    wrapped = _wrapped(model, kind)
    loader = DataLoader(TensorDataset(data(rank, 24 if rank else 14)), batch_size=4)
    run = windows(loader, _Watched(wrapped), micro_batch=4, accumulation_steps=3, model=wrapped)
    samples, micros = [], []
    for window in run:
        for (x,) in window:
            window.backward(wrapped(x).square().mean())
        window.step()
        samples.append(window.samples)
        micros.append(window.micro_batches)
    return {"samples": samples, "micro_batches": micros}


def empty_loader(rank: int) -> str:
    model = _wrapped(nn.Linear(5, 3).double(), "ddp")
    batches = data(0, 4).split(4) if rank else []
    run = windows(batches, _Watched(model), micro_batch=4, accumulation_steps=1, model=model)
    try:
        next(iter(run))
    except UsageError as error:
        return str(error)
    return "no error"


def unknown_model(rank: int, *, given: bool) -> str:
    model = nn.Linear(5, 3)
    try:
        windows(
            [], _Watched(model), micro_batch=1, accumulation_steps=1, model=model if given else None
        )
    except UsageError as error:
        return str(error)
    return "no error"


def tune(
    rank: int, *, mib: tuple[int, int], target: int = 64, fails: tuple[int, ...] = ()
) -> tuple[Any, ...]:
    """Plan on cards of different sizes, on some ranks with a loss that fails."""
    import autobatch

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 4096), nn.ReLU(), nn.Linear(4096, 64))

    def loss(module: nn.Module, x: Tensor) -> Tensor:
        if rank in fails:
            raise ValueError("no loss on this rank")
        return module(x).square().mean()

    card = autobatch.GpuSpec(name=f"card-{rank}", capacity_bytes=mib[rank] * 2**20)
    try:
        plan = autobatch.tune(
            model, target=target, sample=torch.ones(4, 64), loss=loss, gpu=card, cache=False
        )
    except autobatch.AutobatchError as error:
        return (type(error).__name__, str(error))
    return plan.split.windows, plan.ceiling_at_least, plan.warnings


def count_reductions(rank: int, *, how: str) -> int:
    """Reductions of one window of three micro-batches on an FSDP2 model of one layer."""
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group as groups

    from autobatch.support.patching import patched

    model: Any = nn.Linear(5, 3).double()
    wrapped: Any = _wrapped(model, "fsdp")
    optimizer = _Watched(wrapped)
    batches = data(rank, 12).split(4)
    count = 0
    reduce = groups.foreach_reduce

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        return reduce(*args, **kwargs)

    with patched(groups, foreach_reduce=counted):
        if how == "windows":
            run = windows(batches, optimizer, micro_batch=4, accumulation_steps=3, model=wrapped)
            for window in run:
                for x in window:
                    window.backward(wrapped(x).square().mean())
                window.step()
        else:
            for step, x in enumerate(batches):
                silent = getattr(wrapped, "no_sync", _nothing)  # the wrapper of DDP has it
                with silent() if step < 2 else _nothing():
                    (wrapped(x).square().mean() / 3).backward()
    return count
