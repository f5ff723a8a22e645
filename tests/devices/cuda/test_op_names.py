import torch
import torch.nn.functional as F
from torch import nn

from autobatch.devices.cuda.op_names import op_of_each_allocation
from autobatch.devices.running_module import RunningModule


def test_an_allocation_has_the_name_of_the_op_whose_kernel_makes_it():
    layer, inputs = nn.Linear(64, 64), torch.zeros(8, 64)
    with op_of_each_allocation(torch.device("cpu")) as ops:
        hidden = layer(inputs)
        loss = F.layer_norm(hidden, (64,)).sum()
        assert ops == []
    ops = [made.op for made in ops]
    assert ops[0] == "aten::addmm"  # not aten::linear, which is made of it
    assert set(ops) >= {"aten::native_layer_norm", "aten::sum"}
    assert not {"aten::linear", "aten::layer_norm", "aten::empty"} & set(ops)
    with op_of_each_allocation(torch.device("cpu")) as ops:
        loss.backward()
    ops = [made.op for made in ops]
    assert {"aten::native_layer_norm_backward", "aten::mm"} <= set(ops)


def test_allocations_on_other_devices_are_not_named():
    with op_of_each_allocation(torch.device("cuda", 0)) as ops:
        torch.zeros(64)
    assert ops == []


def test_an_allocation_is_that_of_the_module_whose_forward_or_backward_pass_makes_it():
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))
    running = RunningModule()
    running.learn(model)
    inputs = torch.zeros(8, 64)

    with op_of_each_allocation(torch.device("cpu"), running) as seen, running.followed():
        model(inputs).pow(2).sum().backward()

    modules = {}
    for made in seen:
        modules.setdefault(made.op, set()).add(made.module)
    assert modules["aten::addmm"] == {"0", "2"}
    assert modules["aten::gelu"] == modules["aten::gelu_backward"] == {"1"}
    assert modules["aten::mm"] == {"0", "2"}
    assert modules["aten::sum"] >= {""}


def test_an_allocation_has_the_tensors_that_ops_took_from_it():
    layer, inputs = nn.Linear(64, 32), torch.zeros(8, 64)
    with op_of_each_allocation(torch.device("cpu")) as seen:
        hidden = layer(inputs)
        torch.cat([hidden.half().view(4, 64), inputs[:4]]).sum()

    tensors = [(made.op, made.tensors) for made in seen]
    assert tensors[0] == ("aten::addmm", (((8, 32), torch.float32),))
    assert tensors[1][1][0] == ((8, 32), torch.float16)  # before it is looked at otherwise
    assert ((4, 64), torch.float16) in tensors[1][1]
