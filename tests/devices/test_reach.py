"""Whatever a step reaches is the user's own afterwards, and its memory is counted."""

from __future__ import annotations

import contextlib
import csv
import random
from collections import deque
from io import StringIO
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autobatch
from autobatch import GpuSpec, Workload, WorkloadError
from autobatch.devices.base import Device
from autobatch.support.units import MIB
from tests.support import reaching
from tests.support.devices import KINDS, opened
from tests.support.everything import differences, everything
from tests.support.reaching import MAKERS, WIDTH, net, square


def made(name: str) -> Workload:
    torch.manual_seed(0)  # a rectifier could leave no gradient of weights that nobody chose
    given: dict[str, Any] = {"model": net(), "batch": lambda n: torch.ones(n, WIDTH)}
    return Workload(**given | MAKERS[name]())


def reached(workload: Workload) -> dict[str, Any]:
    parts = {name: getattr(workload, name) for name in ("model", "loss", "window", "optimizer")}
    return everything(
        **parts,
        batch=workload.batch,
        globals=vars(reaching),
        random=f"{random.getstate()} {torch.get_rng_state().tolist()}",
    )


def run(device: Device, workload: Workload, n: int = 4) -> Any:
    with device.hosting(workload):
        return device.run(workload, micro_batch=n, accumulation_steps=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_within_reach_is_changed_by_a_run(kind: str, name: str) -> None:
    workload, device = made(name), opened(kind)
    before = reached(workload)
    fails = pytest.raises(WorkloadError, match="broken") if "raises" in name else None
    with fails or contextlib.nullcontext():
        first = run(device, workload).trace
        assert run(device, workload).trace == first  # each run makes its copies anew
    assert differences(before, reached(workload)) == []


@pytest.mark.parametrize("name", [name for name in MAKERS if "raises" not in name])
def test_nothing_within_reach_is_changed_by_a_plan_and_training_goes_on(name: str) -> None:
    workload = made(name)
    before = reached(workload)
    card = GpuSpec(name="card", capacity_bytes=64 * MIB)
    plan = autobatch.tune(workload, target=64, gpu=card, cache=False)
    assert plan.method != "bisection"
    assert not any("tensors of the simulation" in warning for warning in plan.warnings)
    assert differences(before, reached(workload)) == []
    autobatch.predict(workload, micro_batch=3, gpu=card)
    assert differences(before, reached(workload)) == []
    if workload.loss is not None:
        weight = next(workload.model.parameters())
        was = weight.detach().clone()
        value = workload.loss(workload.model, torch.ones(2, WIDTH))
        value.backward()
        assert (type(value), type(weight.grad)) == (Tensor, Tensor)
        torch.optim.SGD(workload.model.parameters(), 1.0).step()
        assert not torch.equal(weight.detach(), was)


@pytest.mark.parametrize(
    "name", [name for name in MAKERS if "window" not in MAKERS[name]() and "raises" not in name]
)
def test_nothing_within_reach_is_changed_by_a_check(name: str) -> None:
    workload = made(name)
    before = reached(workload)
    autobatch.check_equivalence(workload, micro_batch=2, accumulation_steps=2)
    assert differences(before, reached(workload)) == []


def held(workload: Workload) -> autobatch.Footprint:
    return autobatch.predict(workload, micro_batch=4, gpu="t4")


def test_the_state_of_optimizers_in_hooks_is_counted_and_their_gradients_are_freed() -> None:
    workload = made("optimizer_in_the_backward_pass")
    weights = sum(p.nbytes for p in workload.model.parameters())
    shown = held(workload)
    assert 2 * weights <= shown.optimizer_bytes <= 2 * weights + 8 * 512
    assert shown.gradients_bytes < weights


def test_an_average_that_is_made_in_the_first_window_is_in_every_account() -> None:
    workload = made("average_made_at_the_first_window")
    weights = sum(p.nbytes for p in workload.model.parameters())
    assert held(workload).other_bytes >= weights
    assert held(workload).other_bytes >= weights  # also in the second


@pytest.mark.parametrize("name", ["teacher_in_a_list_of_an_object", "callable_object"])
def test_a_teacher_is_in_the_account_wherever_it_is_held(name: str) -> None:
    workload = made(name)
    shown = held(workload)
    weights = sum(p.nbytes for p in workload.model.parameters())
    assert shown.parameters_bytes + shown.other_bytes >= 2 * weights


def test_a_second_optimizer_is_counted_and_one_that_never_steps_is_named() -> None:
    model = nn.Linear(64, 64)
    other = torch.optim.AdamW(model.parameters())

    def window(model: nn.Module, optimizer: Any, batches: Any) -> None:
        for x in batches:
            square(model, x).backward()
        other.step()
        other.zero_grad()

    workload = Workload(model=model, batch=lambda n: torch.ones(n, 64), window=window)
    plan = autobatch.tune(workload, target=8, gpu="t4", cache=False)
    assert any("never made a step; AdamW did" in warning for warning in plan.warnings)
    assert plan.footprint.optimizer_bytes >= 2 * sum(p.nbytes for p in model.parameters())
    assert not other.state


def by_lines(file: Any) -> Any:
    return lambda n: torch.tensor([[float(file.readline() or 0)] * WIDTH for _ in range(n)])


def by_rows(file: Any) -> Any:
    rows = csv.reader(file)
    return lambda n: torch.tensor([[float(*next(rows, "0"))] * WIDTH for _ in range(n)])


def by_going_through(file: Any) -> Any:
    def batch(n: int) -> Tensor:
        read = [float(line) for line, _ in zip(file, range(n), strict=False)]
        return torch.tensor([[value] * WIDTH for value in read] or [[0.0] * WIDTH])

    return batch


@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize("reads", [by_lines, by_rows, by_going_through])
def test_a_file_is_read_on_from_where_it_was(reads: Any, in_memory: bool, tmp_path: Path) -> None:
    path = tmp_path / "numbers"
    path.write_text("".join(f"{number}\n" for number in range(400)))
    with StringIO(path.read_text()) if in_memory else path.open() as file:
        assert [next(file), next(file), next(file)][-1] == "2\n"  # after which texts do not tell
        batch = reads(file)
        plan = autobatch.tune(Workload(model=net(), batch=batch), target=64, gpu="t4", cache=False)
        assert plan.micro_batch
        assert batch(2)[:, 0].tolist() == [3.0, 4.0]


def test_a_file_that_the_step_writes_is_left_alone(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w+") as file:
        model = net()

        def loss(model: nn.Module, x: Tensor) -> Tensor:
            file.write("step\n")
            return square(model, x)

        training = Workload(model=model, loss=loss, batch=lambda n: torch.ones(n, WIDTH))
        autobatch.predict(training, micro_batch=2, gpu="t4")
        assert file.tell() == 2 * len("step\n")  # two windows of one micro-batch


def test_a_generator_that_the_step_draws_from_is_named() -> None:
    def numbers() -> Any:
        while True:
            yield 1.0

    drawn = numbers()
    workload = Workload(
        model=net(),
        batch=lambda n: torch.ones(n, WIDTH),
        loss=lambda model, x: square(model, x) * next(drawn),
    )
    plan = autobatch.tune(workload, target=8, gpu="t4", cache=False)
    assert any("the generator numbers (test_reach.py" in warning for warning in plan.warnings)


def test_what_shares_an_object_shares_its_copy() -> None:
    model = net()
    pair = {"model": model, "weights": list(model.parameters())}

    def loss(given: nn.Module, x: Tensor) -> Tensor:
        assert pair["model"] is given is not None
        assert all(a is b for a, b in zip(pair["weights"], given.parameters(), strict=True))
        return square(given, x)

    workload = Workload(model=model, batch=lambda n: torch.ones(n, WIDTH), loss=loss)
    assert run(opened("simulated"), workload).is_free


class Follower(nn.Module):
    """Learns where it is from `.to`, as Lightning's modules and metrics do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.place = nn.Linear(WIDTH, WIDTH), torch.device("cpu")

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.place = fn(torch.zeros(1, device=self.place)).device
        return super()._apply(fn, recurse)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + torch.ones(WIDTH, device=self.place)


def test_a_module_that_learns_its_device_from_to_is_told() -> None:
    model = Follower()
    workload = Workload(model=model, batch=lambda n: torch.ones(n, WIDTH), loss=square)
    assert run(opened("simulated"), workload).is_free
    assert model.place == torch.device("cpu")


def test_tensors_left_in_the_cache_of_a_library_are_removed_and_that_is_said() -> None:
    cache: dict[str, Any] = {"before": 1}
    library = SimpleQueue()  # what C code holds is not walked
    library.put(cache)

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        found = library.get()
        library.put(found)
        found["mask"] = [square(model, x)]
        return found["mask"][0]

    workload = Workload(model=net(), batch=lambda n: torch.ones(n, WIDTH), loss=loss)
    plan = autobatch.tune(workload, target=8, gpu="t4", cache=False)
    assert library.get() is cache == {"before": 1}
    assert any("dict kept tensors of the simulation" in warning for warning in plan.warnings)


def test_gradients_that_a_step_leaves_on_another_model_are_no_tensors_that_were_kept() -> None:
    critic = net()

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        critic(model(x).detach()).mean().backward()
        return model(x).mean()

    workload = Workload(model=net(), batch=lambda n: torch.ones(n, WIDTH), loss=loss)
    assert autobatch.tune(workload, target=8, gpu="t4", cache=False).warnings == ()
    assert all(parameter.grad is None for parameter in critic.parameters())


def test_that_several_nameless_dicts_kept_tensors_is_said_once() -> None:
    library = SimpleQueue()
    library.put([{"before": 1}, {"before": 2}])

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        found = library.get()
        library.put(found)
        for cache in found:
            cache["mask"] = square(model, x)
        return found[0]["mask"]

    workload = Workload(model=net(), batch=lambda n: torch.ones(n, WIDTH), loss=loss)
    notes = run(opened("simulated"), workload).notes
    assert len([note for note in notes if "dict kept tensors of the simulation" in note]) == 1
    assert library.get() == [{"before": 1}, {"before": 2}]


def test_what_cannot_be_put_back_is_an_error() -> None:
    library = SimpleQueue()
    library.put(deque())

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        found = library.get()
        library.put(found)
        found.append(square(model, x))
        return found[-1]

    workload = Workload(model=net(), batch=lambda n: torch.ones(n, WIDTH), loss=loss)
    with pytest.raises(WorkloadError, match="deque holds tensors of the simulation"):
        run(opened("simulated"), workload)


def test_what_a_step_that_fails_leaves_behind_is_removed_too() -> None:
    cache: dict[str, Any] = {"before": 1}
    library = SimpleQueue()
    library.put(cache)

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        found = library.get()
        library.put(found)
        found["mask"] = square(model, x)
        raise ValueError("broken")

    workload = Workload(model=net(), batch=lambda n: torch.ones(n, WIDTH), loss=loss)
    with pytest.raises(WorkloadError, match=r"broken; .*dict kept tensors of the simulation"):
        run(opened("simulated"), workload)
    assert library.get() is cache == {"before": 1}


_KEPT_OPS = (torch.ops.aten.mm.default, torch.ops.aten.mm)


def test_ops_that_a_global_of_the_users_names_are_kept_as_they_are():
    """A policy of selective checkpointing lists ops, and ops hold one another."""

    def loss(model, batch):
        assert _KEPT_OPS[0] is torch.ops.aten.mm.default
        return model(batch).sum()

    found = autobatch.predict(
        torch.nn.Linear(4, 4), sample=torch.zeros(2, 4), loss=loss, micro_batch=2, gpu="t4"
    )
    assert found.peak_allocated_bytes > 0
