"""The update after a window: cut short by a lack of memory, or with infinite gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from autobatch import AutobatchWarning, DoesNotFitError, windows
from autobatch.accumulate.written import Written
from tests.support.shortages import OOM


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).double()


def data() -> Tensor:
    return torch.randn(12, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def losses(model: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda batch: model(batch).square().mean()


def apart(left: nn.Module, right: nn.Module) -> float:
    pairs = zip(left.parameters(), right.parameters(), strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


# -- optimizers of other libraries


class ThroughPointers(torch.optim.Optimizer):
    """Writes as compiled optimizers do: no version of a tensor tells."""

    def __init__(self, parameters: Any, lr: float = 0.1) -> None:
        super().__init__(parameters, {"lr": lr, "k": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["k"] += 1  # as Schedule-Free and Prodigy count
            for p in group["params"]:
                p.data.add_(p.grad.data, alpha=-group["lr"] / group["k"])
                stumble("parameter")


class Lookahead(torch.optim.Optimizer):
    """Keeps slow weights outside of its state, around another optimizer."""

    def __init__(self, base: torch.optim.Optimizer) -> None:
        self.base = base
        self.slow = [[p.detach().clone() for p in g["params"]] for g in base.param_groups]
        self.counts = {"steps": 0}
        super().__init__([p for g in base.param_groups for p in g["params"]], {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.base.step()
        self.counts["steps"] += 1
        for group, slow in zip(self.base.param_groups, self.slow, strict=True):
            for p, kept in zip(group["params"], slow, strict=True):
                kept.add_(p - kept, alpha=0.5)
                p.data = kept.clone()
                stumble("parameter")


class ListedState(torch.optim.SGD):
    """Has entries in its state that are neither dictionaries nor tensors."""

    def step(self, closure: Any = None) -> None:
        self.state["history"] = [*self.state.get("history", []), 1]  # type: ignore[call-overload]
        super().step()
        stumble("parameter")


class Slots:
    __slots__ = ("average", "steps")

    def __init__(self) -> None:
        self.steps, self.average = 0, np.zeros(2)


class Elsewhere(torch.optim.SGD):
    """Keeps what it knows in slots, in arrays and in a module."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=0.1)
        self.own, self.net = Slots(), nn.Linear(2, 2).double()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.own.steps += 1
        self.own.average += 1
        self.net.weight.data += 1
        for group in self.param_groups:
            for p in group["params"]:
                p.data.add_(p.grad, alpha=-self.own.average[0] * self.net.weight[0, 0].item() / 9)
                stumble("parameter")


def _elsewhere(model: nn.Module) -> torch.optim.Optimizer:
    torch.manual_seed(4)
    return Elsewhere(model.parameters())


OTHERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "through pointers": lambda model: ThroughPointers(model.parameters()),
    "lookahead": lambda model: Lookahead(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)),
    "elsewhere": _elsewhere,
    "listed state": lambda model: ListedState(model.parameters(), lr=0.1, momentum=0.9),
}

_left = [0]


def stumble(_: str) -> None:
    """Run out of memory where the count ends."""
    _left[0] -= 1
    if _left[0] == 0:
        raise torch.OutOfMemoryError(OOM)


def trained(kind: str, fails_at: int, **options: Any) -> nn.Module:
    """Train three windows; the second update runs out of memory after so many parameters."""
    model = network()
    optimizer = OTHERS[kind](model)
    for number, window in enumerate(
        windows(data().split(2), optimizer, micro_batch=2, accumulation_steps=2, **options)
    ):
        window.run(losses(model))
        _left[0] = fails_at if number == 1 else 0
        window.step()
    return model


@pytest.mark.filterwarnings("ignore::autobatch.AutobatchWarning")
@pytest.mark.parametrize("fails_at", [1, 3])
@pytest.mark.parametrize("kind", sorted(OTHERS))
def test_whatever_an_optimizer_writes_is_taken_back_from_a_copy(kind: str, fails_at: int) -> None:
    expected = trained(kind, 0)
    assert apart(trained(kind, fails_at, guard_update=True), expected) < 1e-15


@pytest.mark.parametrize("kind", sorted(OTHERS))
def test_what_another_librarys_optimizer_wrote_is_said_to_be_unknown(kind: str) -> None:
    with pytest.raises(DoesNotFitError, match=r"not known which parameters.*guard_update=True"):
        trained(kind, 1)


# -- PyTorch's own


_ALLOCATES = frozenset(("zeros_like", "add", "div", "sqrt", "norm", "mul", "clone", "tensor"))


class _Fails(TorchFunctionMode):
    """Runs out of memory at the nth call that writes to a tensor, or makes one."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.left = at

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        self.left -= (
            name in _ALLOCATES or name.startswith("_foreach") or name[-1:] == "_" != name[0]
        )
        if not self.left:
            raise torch.OutOfMemoryError(OOM)
        return func(*args, **(kwargs or {}))


TORCHS_OWN = {
    "SGD": {},
    "SGD with momentum": {"momentum": 0.9, "weight_decay": 0.1},
    "Adam": {"amsgrad": True},
    "AdamW": {},
    "Adadelta": {},
    "Adagrad": {},
    "Adamax": {},
    "ASGD": {},
    "NAdam": {},
    "RAdam": {},
    "RMSprop": {"momentum": 0.9, "centered": True},
    "Rprop": {},
    "Adafactor": {},
}


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("name", sorted(TORCHS_OWN))
def test_an_update_of_pytorchs_own_tells_whether_it_changed_anything(
    name: str, steps: int, foreach: bool
) -> None:
    """Cut short at each of its operations: what is first written tells of all."""
    model = network()
    kind = getattr(torch.optim, name.partition(" ")[0])
    optimizer = kind(model.parameters(), lr=0.1, **TORCHS_OWN[name], foreach=foreach)
    for step in range(steps + 1):
        model.zero_grad()
        losses(model)(data()).backward()
        if step < steps:
            optimizer.step()
    at, seen = 0, set()
    while True:
        at += 1
        other, updates = copy.deepcopy((model, optimizer))
        for p, q in zip(other.parameters(), model.parameters(), strict=True):
            p.grad = q.grad.clone()
        before = _values(other, updates)
        record = Written([updates], copied=False)
        try:
            with torch.enable_grad(), _Fails(at):
                updates.step()
        except torch.OutOfMemoryError:
            changed = _changed(before, _values(other, updates))
            assert record.changed or not changed
            seen.add(changed)
            if not record.changed:
                record.restore()
                assert not _changed(before, _values(other, updates), new=True)
        else:
            break
    assert seen and at > 1


def _values(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[Any, Tensor]:
    values = {("parameter", n): p.detach().clone() for n, p in model.named_parameters()}
    for at, entry in enumerate(optimizer.state.values()):
        values |= {(at, k): v.clone() for k, v in entry.items() if isinstance(v, Tensor)}
    return values


def _changed(before: dict[Any, Tensor], after: dict[Any, Tensor], *, new: bool = False) -> bool:
    """Whether a value that was there is another now; with `new`, also whether there are others."""
    same = all(torch.equal(after[key], value) for key, value in before.items())
    return not same or (new and after.keys() != before.keys())


# -- gradients on the way to the update


@pytest.mark.parametrize("scaled", [False, True])
def test_a_shortage_while_clipping_is_one_like_any_other(
    monkeypatch: pytest.MonkeyPatch, scaled: bool
) -> None:
    expected, model = network(), network()
    clip = nn.utils.clip_grad_norm_
    failed = []

    def short(*args: Any) -> Tensor:
        if not failed:
            failed.append(True)
            raise torch.OutOfMemoryError(OOM)
        return clip(*args)

    for net in (expected, model):
        if net is model:
            monkeypatch.setattr(nn.utils, "clip_grad_norm_", short)
        options = {"scaler": torch.amp.GradScaler("cpu", init_scale=4.0)} if scaled else {}
        run = windows(
            data().split(2),
            torch.optim.SGD(net.parameters(), lr=0.1),
            micro_batch=2,
            accumulation_steps=3,
            clip_norm=0.1,
            **options,
        )
        for window in run:
            window.run(losses(net))
            if net is model and not failed:
                with pytest.warns(AutobatchWarning, match="clipping the gradients ran out of"):
                    window.step()
            else:
                window.step()
    assert failed and apart(model, expected) < 1e-15


def test_a_clip_that_never_fits_ends_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def short(*_: Any) -> Tensor:
        raise torch.OutOfMemoryError(OOM)

    monkeypatch.setattr(nn.utils, "clip_grad_norm_", short)
    model = network()
    before = copy.deepcopy(model)
    window = next(
        iter(
            windows(
                [data()],
                torch.optim.SGD(model.parameters(), lr=0.1),
                micro_batch=6,
                accumulation_steps=2,
                clip_norm=1.0,
            )
        )
    )
    window.run(losses(model))
    with pytest.warns(AutobatchWarning), pytest.raises(DoesNotFitError, match="are as they were"):
        window.step()
    assert apart(model, before) == 0


@pytest.mark.parametrize("clip_norm", [None, 1.0])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_gradients_that_are_not_finite_skip_the_update_of_every_optimizer(
    bad: float, clip_norm: float | None
) -> None:
    models = [network().float(), network().float()]
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in models]
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    run = windows(
        data().float().split(2),
        optimizers,
        micro_batch=2,
        accumulation_steps=2,
        scaler=scaler,
        clip_norm=clip_norm,
    )
    skipped, scales, seen = [], [], [copy.deepcopy(models)]
    for number, window in enumerate(run):
        for batch in window:
            factor = bad if number == 1 else 1.0
            window.backward(models[0](batch).mean() * factor + models[1](batch).mean())
        window.step()
        skipped.append(window.skipped)
        scales.append(scaler.get_scale())
        seen.append(copy.deepcopy(models))
    assert skipped == [False, True, False] and scales == [4.0, 2.0, 2.0]
    for at in (0, 1):
        assert apart(seen[1][at], seen[2][at]) == 0
        assert apart(seen[2][at], seen[3][at]) > 0
        assert all(bool(p.isfinite().all()) for p in models[at].parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_shares_of_a_half_precision_loss_are_not_rounded_away(dtype: torch.dtype) -> None:
    model = nn.Linear(5, 1).to(dtype)
    x = torch.randn(1024, 5).to(dtype)
    run = windows(
        x.split(4),
        torch.optim.SGD(model.parameters(), lr=0.0),
        micro_batch=4,
        accumulation_steps=256,
    )
    means = []
    for window in run:
        for batch in window:
            loss = model(batch).square().mean() * 1e-5
            means.append(float(loss.detach()))
            window.backward(loss)
        window.step()
    assert float(window.loss) == pytest.approx(sum(means) / len(means), rel=1e-5)


def test_gradients_that_the_user_unscaled_are_not_unscaled_again() -> None:
    """PyTorch's documented way to clip with a scaler."""
    models = network().float(), network().float()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in models]
    loader = data().float().split(2)
    run = windows(loader, optimizers[0], micro_batch=2, accumulation_steps=2, scaler=scaler)
    for window in run:
        window.run(losses(models[0]))
        scaler.unscale_(optimizers[0])
        nn.utils.clip_grad_norm_(models[0].parameters(), 0.01)
        window.step()
    for batch in data().float().split(4):
        optimizers[1].zero_grad()
        losses(models[1])(batch).backward()
        nn.utils.clip_grad_norm_(models[1].parameters(), 0.01)
        optimizers[1].step()
    assert apart(*models) < 1e-6
