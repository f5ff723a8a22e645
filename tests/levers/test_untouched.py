"""A lever is applied to copies: the user's model, batches and process are as before."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from autobatch.levers.untouched import State
from tests.levers.setups import RUNS, options_of, peaks, setup_of, with_instance


def state_of(model: nn.Module) -> dict[str, Any]:
    """Return all that a lever could change of a model."""
    return {
        "keys": list(model.state_dict()),
        "parameters": [(id(p), p.requires_grad, p.dtype, p.stride()) for p in model.parameters()],
        "values": [p.detach().clone() for p in model.parameters()],
        "hooks": [dict(p._post_accumulate_grad_hooks or {}) for p in model.parameters()],
        "modules": [(name, type(module), id(module)) for name, module in model.named_modules()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "momenta": [getattr(module, "momentum", None) for module in model.modules()],
        "config": repr(getattr(model, "config", None)),
        "checkpointed": [getattr(m, "gradient_checkpointing", None) for m in model.modules()],
        "forward": model.forward.__func__,
    }


def assert_equal(now: dict[str, Any], before: dict[str, Any]) -> None:
    values = zip(now.pop("values"), before.pop("values"), strict=True)
    assert now == before
    assert all(torch.equal(a, b) for a, b in values)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(RUNS))
def test_nothing_of_the_users_model_changes(name: str) -> None:
    workload = with_instance(RUNS[name]())
    setup = setup_of(workload)
    before, precision = state_of(workload.model), torch.get_float32_matmul_precision()
    groups = [dict(group) for group in workload.optimizer.param_groups]
    options = options_of(setup)
    chosen = {option.lever: option for option in options.values()}
    for option in [*chosen.values(), options.get("optimizer: in backward")]:
        if option is not None:
            peaks(option.apply(setup))
            assert_equal(state_of(workload.model), dict(before))
    assert torch.get_float32_matmul_precision() == precision
    assert setup.workload is workload
    assert [dict(group) for group in workload.optimizer.param_groups] == groups
    assert not workload.optimizer.state


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Sequential(nn.Linear(4, 4)))


def hook(*_: Any) -> None:
    """Do nothing."""


class Other(nn.Linear):
    """A class of its own."""


CHANGES: dict[str, tuple[Any, str]] = {
    "freezing": (lambda m: m[0].requires_grad_(False), "model.0.weight.requires_grad"),
    "evaluation": (lambda m: m.eval(), "model.1.training"),
    "half precision": (lambda m: m.half(), "model.0.weight.dtype"),
    "another module": (lambda m: m.__setitem__(0, nn.Identity()), "model.0"),
    "one module more": (lambda m: m.append(nn.ReLU()), "model.3"),
    "another parameter": (
        lambda m: setattr(m[0], "weight", nn.Parameter(torch.zeros(4, 4))),
        "model.0.weight",
    ),
    "no parameter": (lambda m: setattr(m[0], "bias", None), "model.0.bias"),
    "a buffer": (lambda m: m.register_buffer("more", torch.zeros(1), False), "model.more"),
    "other memory": (lambda m: setattr(m[0].weight, "data", torch.ones(4, 4)), "weight.memory"),
    "a hook": (lambda m: m[0].register_forward_hook(hook), "model.0._forward_hooks"),
    "a tensor's hook": (lambda m: m[0].weight.register_hook(hook), "weight._backward_hooks"),
    "a hook of gradients": (
        lambda m: m[0].weight.register_post_accumulate_grad_hook(hook),
        "weight._post_accumulate_grad_hooks",
    ),
    "a number": (lambda m: setattr(m[1], "momentum", 0.5), "model.1.momentum"),
    "a method": (lambda m: setattr(m[0], "forward", hook), "model.0.forward"),
    "a class": (lambda m: setattr(m[0], "__class__", Other), "model.0.__class__"),
    "an attribute": (lambda m: setattr(m, "more", 1), "model.more"),
    "a setting in an object": (lambda m: setattr(m.config, "cache", False), "config.cache"),
    "an order": (lambda m: m._modules.update({"0": m._modules.pop("0")}), "the order of model"),
    "gradients": (lambda m: m[0](torch.ones(2, 4)).sum().backward(), "model.0.weight.grad"),
}


@pytest.mark.parametrize("name", list(CHANGES))
def test_what_changed_in_place_is_named_and_put_back(name: str) -> None:
    change, said = CHANGES[name]
    model = small()
    model.config = SimpleNamespace(cache=True)
    before, state = state_of(model), State(model=model)
    change(model)
    assert said in ", ".join(state.changes())
    state.put_back()
    assert state.changes() == []
    assert_equal(state_of(model), before)


def test_values_that_changed_are_named_but_not_put_back() -> None:
    model = small()
    state = State(model=model)
    nn.init.zeros_(model[0].weight)
    state.put_back()
    assert state.changes() == ["model.0.weight.values"]


def test_groups_of_an_optimizer_are_put_back_and_its_state_may_be_looked_at() -> None:
    model = small()
    optimizer = torch.optim.AdamW(model.parameters())
    state = State(optimizer=[optimizer])
    assert not optimizer.state[model[0].weight]  # makes an entry
    assert state.changes() == []
    optimizer.param_groups[0]["lr"] = 1.0
    optimizer.add_param_group({"params": [torch.zeros(1, requires_grad=True)]})
    assert "optimizer[0].param_groups[0].lr" in state.changes()
    state.put_back()
    assert state.changes() == [] and len(optimizer.param_groups) == 1


def test_looking_at_a_model_changes_nothing() -> None:
    for model in (small(), small().to("meta"), nn.Sequential(nn.LazyLinear(3))):
        state = State(model=model)
        model.train().state_dict()
        _ = str(model), [*model.named_parameters()], model[0].to(model[0].weight.device)
        assert state.changes() == []
