"""A lever is applied to copies: the user's model, batches and process are as before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

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
