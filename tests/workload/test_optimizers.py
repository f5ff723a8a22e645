import pytest
import torch

from autobatch.errors import UsageError
from autobatch.workload.optimizers import OPTIMIZERS, named_optimizer, names_of, state_of


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_name_makes_an_optimizer(name):
    optimizer = named_optimizer(name.upper())([torch.nn.Parameter(torch.ones(2))])
    assert optimizer.defaults.get("momentum", 0) == (0.9 if name == "sgd-momentum" else 0)


def test_a_name_that_is_none_is_answered_with_the_nearest():
    with pytest.raises(UsageError, match=r"optimizer is 'adamww', .*did you mean adamw"):
        named_optimizer("adamww")


def test_state_is_found_in_containers_and_objects_but_not_in_modules():
    class Held:
        def __init__(self, tensor):
            self.parts = {"deep": [tensor]}

    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter])
    inside, average = torch.ones(3), torch.ones(4)
    optimizer.state[parameter].update(held=Held(inside), again=[inside], step=1, of=print)
    optimizer.average = (average,)
    optimizer.model = torch.nn.Linear(2, 2)
    assert {id(t) for t in state_of(optimizer)} == {id(inside)}
    found = {id(tensor) for tensor in state_of(optimizer, attributes=True)}
    assert found - {id(parameter)} == {id(inside), id(average)}


def test_the_optimizer_inside_an_accelerators_is_the_one_that_is_named():
    accelerate = pytest.importorskip("accelerate")
    inner = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])
    assert names_of([accelerate.Accelerator(cpu=True).prepare(inner)]) == "AdamW"
