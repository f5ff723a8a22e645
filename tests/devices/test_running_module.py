"""Which module is at work, in forward and backward passes; and which line of the user's."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from autobatch.devices.running_module import RunningModule
from autobatch.devices.virtual.gpu import VirtualGpu
from autobatch.gpus.catalogue import find_gpu
from autobatch.memory.trace_model import TraceModel
from autobatch.workload.workload import Workload


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 32)
        self.act = nn.GELU()
        self.last = nn.Linear(32, 4)

    def forward(self, x):
        return self.last(self.act(self.first(x)))


def run(model=None, *, n=4, loss=None, shape=(8,), **options):
    workload = Workload(
        model=model or Net(),
        batch=lambda size: torch.zeros(size, *shape),
        loss=loss or (lambda net, x: net(x).pow(2).sum()),
        **options,
    )
    gpu = VirtualGpu(find_gpu("24GiB"))
    return gpu.run(workload, micro_batch=n, accumulation_steps=1).trace


def modules(trace, phase):
    return {block.label.module for block in trace.blocks if block.phase == phase}


def made(trace, op, phase=None):
    return [b for b in trace.blocks if b.op.startswith(op) and phase in (None, b.phase)]


def test_each_forward_pass_is_that_of_the_module_that_runs():
    trace = run()

    assert {b.label.module for b in made(trace, "aten::addmm", "forward")} == {"first", "last"}
    assert {b.label.module for b in made(trace, "aten::gelu", "forward")} == {"act"}
    assert {b.label.module for b in made(trace, "aten::pow", "forward")} == {""}


def test_each_backward_pass_is_that_of_the_module_whose_forward_pass_made_its_node():
    trace = run()

    assert {b.label.module for b in made(trace, "aten::gelu_backward")} == {"act"}
    assert {b.label.module for b in made(trace, "aten::mm", "backward")} == {"first", "last"}
    assert modules(trace, "backward") == {"", "first", "act", "last"}


@pytest.mark.parametrize("is_reentrant", [True, False])
def test_a_second_forward_pass_in_the_backward_pass_is_that_of_the_modules_that_run(is_reentrant):
    class Checkpointed(Net):
        def forward(self, x):
            x = self.first(x)
            return self.last(checkpoint(self.act, x, use_reentrant=is_reentrant))

    trace = run(Checkpointed())

    assert {b.label.module for b in made(trace, "aten::gelu", "backward")} == {"act"}
    assert {b.label.module for b in made(trace, "aten::gelu_backward")} == {"act"}
    assert {b.label.module for b in made(trace, "aten::mm", "backward")} == {"first", "last"}


def test_gradients_and_optimizer_state_are_the_modules_that_own_the_parameters():
    trace = run(optimizer=torch.optim.AdamW)

    for category in ("parameters", "gradients", "optimizer_state"):
        owned = {
            (b.label.module, b.label.shape)
            for b in trace.blocks
            if b.category == category and torch.Size(b.label.shape).numel() > 32
        }
        assert owned == {("first", (32, 8)), ("last", (4, 32))}, category


def test_a_tied_weight_is_the_first_modules():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)
            self.two.weight = self.one.weight

        def forward(self, x):
            return self.two(self.one(x))

    trace = run(Tied())

    weights = [b for b in trace.blocks if b.category == "parameters" and b.size_bytes == 256]
    assert [b.label.module for b in weights] == ["one"]


def test_modules_outside_of_the_model_are_called_by_their_classes_in_parentheses():
    teacher, criterion = nn.Sequential(Net(), nn.Linear(4, 4)), nn.MSELoss()

    def loss(net, x):
        with torch.no_grad():
            wanted = teacher(x)
        return criterion(net(x), wanted)

    trace = run(loss=loss)

    foreign = {name for name in modules(trace, "forward") if name.startswith("(")}
    assert foreign == {
        "(MSELoss)",
        *(f"(Sequential).{path}" for path in ("0.first", "0.act", "0.last", "1")),
    }
    assert {b.label.module for b in made(trace, "aten::mse_loss_backward")} == {"(MSELoss)"}


def test_a_module_that_a_module_makes_for_one_call_is_part_of_it():
    class Making(Net):
        def forward(self, x):
            return nn.Softmax(-1)(super().forward(x))

    assert {b.label.module for b in made(run(Making()), "aten::_softmax", "forward")} == {""}


def test_the_second_derivative_is_the_modules_whose_first_one_was_taken():
    def penalty(net, x):
        x = x.requires_grad_()
        (gradient,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
        return gradient.pow(2).sum()

    trace = run(loss=penalty)

    assert {"first", "last"} <= modules(trace, "backward")


def test_scratch_is_that_of_the_module_whose_kernel_takes_it():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.LazyLinear(4))
    model(torch.zeros(1, 3, 16, 16))

    trace = run(model, shape=(3, 16, 16))

    scratch = [b for b in trace.blocks if b.op.startswith("cudnn")]
    assert scratch
    assert {b.label.module for b in scratch} == {"0"}
    libraries = [b for b in trace.blocks if b.op == "cublas workspace"]
    assert {b.label.module for b in libraries} == {""}


def test_the_line_is_the_innermost_of_the_users_code_in_the_forward_pass():
    def loss(net, x):
        return net(x).sigmoid().sum()

    trace = run(loss=loss)

    (line,) = {b.label.where for b in made(trace, "aten::sigmoid", "forward")}
    assert line == f"devices/{__file__.split('/')[-1]}:{loss.__code__.co_firstlineno + 1} loss"
    (line,) = {b.label.where for b in made(trace, "aten::gelu", "forward")}
    assert line.endswith(" forward")
    assert {b.label.where for b in trace.blocks if b.phase in ("setup", "backward", "step")} == {""}


def test_a_library_module_that_is_called_at_two_lines_is_that_of_each_line():
    inner = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.GELU(), nn.Linear(8, 8)))

    def loss(net, x):
        once = net(x)
        again = net(once)
        return again.pow(2).sum()

    trace = run(nn.Sequential(inner), loss=loss)

    first = loss.__code__.co_firstlineno
    of_calls = [b.label.where for b in made(trace, "aten::addmm", "forward")]
    file = f"devices/{__file__.split('/')[-1]}"
    one_window = [f"{file}:{first + line} loss" for line in (1, 1, 2, 2)]
    assert of_calls == [*one_window, *one_window]


def test_labels_of_a_predicted_trace_are_those_of_one_that_runs():
    small, large, executed = (run(n=n) for n in (2, 5, 64))

    predicted = TraceModel.fit([small, large]).trace(64)

    assert predicted == executed
    assert [b.label for b in predicted.blocks] == [b.label for b in executed.blocks]
    assert (64, 32) in {b.label.shape for b in predicted.blocks}


def test_calls_of_modules_are_as_before_also_after_an_error():
    before = nn.Module.__call__
    running = RunningModule()

    def fails():
        with running.followed():
            assert nn.Module.__call__ is not before
            nn.Linear(2, 2)(torch.zeros(1, 3))

    with pytest.raises(RuntimeError):
        fails()

    assert nn.Module.__call__ is before
    assert running.name() == ""


def test_names_are_the_users_when_a_lever_wraps_modules():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    def wrap(model):
        model.act = checkpoint_wrapper(model.act)

    trace = run(changes=(wrap,))

    assert modules(trace, "forward") == {"", "first", "act", "last"}


def test_names_are_those_of_named_modules_where_parts_are_compiled_or_wrapped():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = Net()
    model.first = torch.compile(nn.Sequential(model.first))
    model.last = checkpoint_wrapper(model.last)

    trace = run(model)

    assert modules(trace, "forward") <= {name for name, _ in model.named_modules()}
    assert "first._orig_mod.0" in modules(trace, "forward")
    assert "last._checkpoint_wrapped_module" in modules(trace, "forward")


def test_names_are_the_users_when_a_lever_puts_the_model_into_another_one():
    class Adapted(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base_layer = base
            self.adapter = nn.Linear(base.in_features, base.out_features, bias=False)

        def forward(self, x):
            return self.base_layer(x) + self.adapter(x)

    model = nn.ModuleDict({"layers": nn.Sequential(nn.Linear(4, 4), nn.ReLU()), "head": nn.ReLU()})
    running = RunningModule()
    running.learn(model)
    outer = nn.ModuleDict({"base_model": nn.ModuleDict({"model": model})})
    model["layers"][0] = Adapted(model["layers"][0])
    running.learn(outer)

    named = {path: running.name_of(module, "?") for path, module in outer.named_modules()}
    below = "base_model.model.layers.0"
    assert named["base_model.model.head"] == "head"
    assert named[below] == named[f"{below}.base_layer"] == "layers.0"
    assert named[f"{below}.adapter"] == "layers.0.adapter"
    assert running.owner(model["layers"][0].adapter.weight) == "layers.0.adapter"
