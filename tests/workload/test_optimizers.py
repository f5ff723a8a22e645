import pytest
import torch

from autobatch.errors import UsageError
from autobatch.workload.optimizers import OPTIMIZERS, named_optimizer


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_name_makes_an_optimizer(name):
    optimizer = named_optimizer(name.upper())([torch.nn.Parameter(torch.ones(2))])
    assert optimizer.defaults.get("momentum", 0) == (0.9 if name == "sgd-momentum" else 0)


def test_a_name_that_is_none_is_answered_with_the_nearest():
    with pytest.raises(UsageError, match=r"optimizer is 'adamww', .*did you mean adamw"):
        named_optimizer("adamww")
