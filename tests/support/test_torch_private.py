"""What is private in PyTorch: named in one module, there, and as it is relied on."""

from __future__ import annotations

import ast
import inspect
import os
import pkgutil
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FunctionType

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from autobatch.errors import UsageError
from autobatch.support import torch_private
from autobatch.support.torch_private import (
    FOREACH_MODULES,
    NEWEST_TORCH,
    OLDEST_TORCH,
    SUPPORTED_NODES,
    VF,
    FakeTensor,
    FakeTensorMode,
    OpOverload,
    fake_tensor,
)
from tests.support import ROOT

SEAM = Path(torch_private.__file__)
aten = torch.ops.aten


# -- one module names them


def private_parts(source: str) -> list[str]:
    """Return the private parts of PyTorch's modules that a file names, in code or in words.

    Ops (`torch.ops.aten._name`), attributes of classes and objects, and what PyTorch's own pages
    tell users to call do not count, but in code the latter do.
    """
    return [*_in_words(source), *_in_code(ast.parse(source))]


_WORDS = re.compile(r"\btorch(?:\.\w+)*?\._[A-Za-z]\w*|\bfrom torch[\w.]* import .*\b_[A-Za-z]\w*")
# https://docs.pytorch.org/docs/stable/torch_cuda_memory.html
# https://docs.pytorch.org/tutorials/intermediate/FSDP_advanced_tutorial.html
_DOCUMENTED = re.compile(
    r"torch\.(ops\.|cuda\.memory\._(snapshot|dump_snapshot|record_memory_history)\b"
    r"|distributed\.algorithms\._checkpoint\b)"
)


def _in_words(source: str) -> list[str]:
    return [name for name in _WORDS.findall(source) if not _DOCUMENTED.match(name)]


def _in_code(tree: ast.AST) -> Iterator[str]:
    modules = {}  # what a name in this file stands for
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "torch":
                    modules[alias.asname or "torch"] = alias.name if alias.asname else "torch"
                    yield from _if_private(alias.name)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            for alias in node.names:
                modules[alias.asname or alias.name] = name = f"{node.module}.{alias.name}"
                yield from _if_private(name)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            root, _, rest = ast.unparse(node).partition(".")
            if root in modules:
                yield from _if_private(f"{modules[root]}.{rest}")


def _if_private(dotted: str) -> Iterator[str]:
    """Yield the name if a module holds it and it begins with one underscore."""
    owner, _, name = dotted.rpartition(".")
    if re.match("_(?!_)", name) or "._" in owner:
        if owner.startswith("torch.ops") or not re.fullmatch(r"[\w.]+", dotted):
            return
        if not isinstance(pkgutil.resolve_name(owner), type):
            yield dotted


@pytest.mark.parametrize(
    "source",
    [
        "import torch._dynamo.config",
        "import torch.utils._pytree as pytree",
        "from torch._subclasses import fake_tensor",
        "from torch.nn.modules.batchnorm import _BatchNorm",
        "from torch.utils import _pytree",
        "def f():\n    from torch.distributed.fsdp import _fully_shard",
        "import torch\ntorch._C._cuda_clearCublasWorkspaces()",
        "import torch\ntorch.cuda.memory._snapshot(0)",
        "import torch\ngetattr(torch._C, '_cudnn', None)",
        "from torch import nn\nnn.modules.batchnorm._BatchNorm",
        "from torch import cuda\ncuda.memory._snapshot(0)",
        "import torch.autograd.graph as graph\ngraph._engine_run_backward",
        "name = 'torch._subclasses.fake_tensor'",
        "name = 'torch.utils.backend_registration._setup_privateuseone_for_python_backend'",
        "# as torch.utils._pytree has it",
    ],
)
def test_a_private_part_is_found_wherever_it_is_named(source):
    assert private_parts(source)


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.ops.aten._cudnn_rnn.default",
        "import torch\ntorch.__version__",
        "from torch import Tensor\nTensor._make_subclass(Tensor, data)",
        "def f(module):\n    return module._parameters, module.weight._version",
        "from torch.distributed.tensor import DTensor\nDTensor.from_local(x)._spec",
        "message = 'torch.cuda.memory._snapshot() makes one'",
        "from autobatch.support.torch_private import fake_tensor",
    ],
)
def test_ops_attributes_of_objects_and_what_users_type_are_no_private_parts(source):
    assert not private_parts(source)


@pytest.mark.slow
def test_one_module_names_private_parts_of_pytorch_and_no_other() -> None:
    files = [path for path in (ROOT / "autobatch").rglob("*.py") if path != SEAM]
    assert len(files) > 100 and private_parts(SEAM.read_text(encoding="utf-8"))
    found = {path.name: private_parts(path.read_text(encoding="utf-8")) for path in files}
    assert {name: parts for name, parts in found.items() if parts} == {}


# -- a missing one is a clear error


def imported_names() -> list[tuple[str, str]]:
    """Return the modules and names of which the seam imports something when it is imported."""
    (block,) = (node for node in ast.parse(SEAM.read_text()).body if isinstance(node, ast.With))
    return [
        (str(node.module), alias.name)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if f"{node.module}.{alias.name}" not in sys.modules  # a module is found there, too
    ]


@pytest.mark.parametrize(("module", "name"), imported_names())
def test_a_missing_name_is_an_error_that_names_it_and_the_versions(module, name, monkeypatch):
    monkeypatch.delattr(pkgutil.resolve_name(module), name)
    with pytest.raises(UsageError) as caught:
        runpy.run_path(str(SEAM))
    message = str(caught.value)
    assert f"'{name}'" in message and "\n" not in message and "site-packages" not in message
    assert f"torch {torch.__version__} is built" in message
    assert f"use torch {OLDEST_TORCH} to {NEWEST_TORCH}" in message


@pytest.mark.parametrize("module", ["torch._guards", "torch._subclasses.fake_impls"])
def test_a_missing_module_is_an_error_that_names_it(module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UsageError, match=module.replace(".", r"\.")):
        runpy.run_path(str(SEAM))


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        *((module, "_foreach_supported_types") for module in FOREACH_MODULES),
        (fake_tensor, "CONSTANT_NUMEL_LIMIT"),
        (fake_tensor, "run_fallback_kernel"),
        (torch.autograd, "_engine_run_backward"),
    ],
)
def test_a_missing_name_that_would_be_replaced_is_an_error_before(owner, name, monkeypatch):
    monkeypatch.delattr(owner, name)
    with pytest.raises(UsageError, match=name):
        runpy.run_path(str(SEAM))


@pytest.mark.slow
def test_on_the_command_line_it_is_a_message_and_exit_code_2():
    code = (
        "import sys, torch.utils._mode_utils as home; del home.no_dispatch\n"
        "from autobatch.cli.entry_point import main\n"
        "sys.exit(main(['probe', 'timm:resnet18', '--target', '8', '--gpu', 't4', '--no-isolate']))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 2
    assert re.match(r"autobatch: error: torch .*'no_dispatch'.*use torch", run.stderr)


# -- the versions that work


def test_the_oldest_torch_is_the_one_that_pyproject_asks_for_and_ci_runs() -> None:
    def text(path: str) -> str:
        return (ROOT / path).read_text(encoding="utf-8")

    assert f'"torch>={OLDEST_TORCH}",' in text("pyproject.toml")
    assert f'"torch=={OLDEST_TORCH}.0"' in text("Makefile")
    assert f'"torch=={OLDEST_TORCH}.*"' in text(".github/workflows/ci.yml")
    assert "make test-lowest" in text(".ci/run")


def test_this_torch_is_none_that_is_too_old() -> None:
    def numbers(version: str) -> list[int]:
        return [int(part) for part in version.split(".")[:2]]

    assert numbers(OLDEST_TORCH) <= numbers(torch.__version__)
    assert numbers(OLDEST_TORCH) <= numbers(NEWEST_TORCH)


# -- they are as the package relies on them


def parameters(function: object) -> list[str]:
    return list(inspect.signature(function).parameters)  # type: ignore[arg-type]


def reads(owner: object, name: str) -> bool:
    """Whether a function of a module or class looks a global name up when it runs."""
    functions = [inspect.unwrap(value) for value in vars(owner).values() if callable(value)]
    todo = [each.__code__ for each in functions if isinstance(each, FunctionType)]
    while todo:
        code = todo.pop()
        if name in code.co_names:
            return True
        todo += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return False


def test_the_fake_mode_is_made_and_overridden_as_it_was():
    assert "allow_non_fake_inputs" in parameters(FakeTensorMode)
    dispatch = ["self", "func", "types", "args", "kwargs"]
    assert parameters(FakeTensorMode.__torch_dispatch__) == dispatch
    if not torch.__version__.startswith("2.10."):  # which never wraps what is overridden
        assert parameters(FakeTensorMode._should_skip_dynamo) == []
    assert isinstance(FakeTensorMode.avoid_device_init, property)
    assert parameters(FakeTensorMode.from_tensor)[:2] == ["self", "tensor"]
    mode = FakeTensorMode()
    assert mode.cache_enabled in (True, False) and mode.in_kernel_invocation is False


def test_a_fake_tensor_is_made_of_a_mode_a_meta_tensor_and_a_device():
    assert parameters(FakeTensor.__new__)[2:4] == ["elem", "device"]
    mode = FakeTensorMode()
    fake = FakeTensor(mode, torch.empty(2, device="meta"), torch.device("cpu"))
    assert fake.fake_device == torch.device("cpu") and fake.fake_mode is mode
    again = Tensor._make_subclass(
        FakeTensor,
        torch.empty(2, device="meta"),
        False,
        dispatch_device=True,
        device_for_backend_keys=torch.device("cpu"),
    )
    again.__dict__.update(fake.__dict__)
    assert type(again) is FakeTensor and again.device == torch.device("cpu")


def test_what_is_replaced_is_looked_up_where_it_is_replaced():
    assert reads(FakeTensorMode, "CONSTANT_NUMEL_LIMIT")
    assert reads(FakeTensorMode, "run_fallback_kernel")
    assert reads(torch.autograd, "_engine_run_backward")
    assert all(reads(module, "_foreach_supported_types") for module in FOREACH_MODULES)
    assert parameters(fake_tensor.run_fallback_kernel) == [
        *("fake_mode", "func", "flat_args", "args_spec", "orig_not_implemented_exception")
    ]
    assert reads(nn.LSTM, "_VF") and nn.modules.rnn._VF is VF
    assert nn.utils.rnn._VF is VF and reads(nn.utils.rnn, "_VF")
    assert parameters(nn.Module._apply)[:2] == ["self", "fn"]
    assert torch.distributions.Distribution._validate_args in (True, False)


def test_rules_of_the_fake_mode_are_pairs_of_a_question_and_an_answer():
    rules = torch_private.op_implementations_checks
    assert len(rules) > 2
    for applies, answer in rules:
        assert callable(answer)
        assert applies(aten.relu.default) in (True, False)


def test_fake_tensors_can_be_set_aside_and_the_mode_is_told():
    with FakeTensorMode() as mode, torch_private.unset_fake_temporarily() as found:
        assert found is mode
        assert type(torch.ones(1)) is Tensor
    fake = mode.from_tensor(torch.ones(1))
    assert torch_private.detect_fake_mode([fake]) is mode
    assert torch_private.detect_fake_mode([torch.ones(1)]) is None
    with mode, torch_private.no_dispatch():
        assert type(torch.ones(1)) is Tensor


def test_a_python_backend_is_registered_by_these_names():
    register = parameters(torch_private.register_private_use_1)
    assert {"rename", "backend_module", "hook", "device_guard"} <= set(register)
    assert isinstance(torch_private.private_use_1_name(), str)
    assert callable(torch_private.DeviceGuard.type_)
    for name in ("is_available", "has_primary_context", "is_built"):
        assert callable(getattr(torch_private.PrivateUse1Hooks, name))
    key = torch_private.parse_dispatch_key("AutocastPrivateUse1")
    with torch_private.ExcludeDispatchKeyGuard(torch_private.DispatchKeySet(key)):
        assert int(torch_private.PRIVATE_USE_1) == 20


def test_holders_of_a_tensor_are_counted():
    tensor = torch.ones(2)
    storage = tensor.untyped_storage()._cdata
    count = torch_private.storage_use_count(storage)
    assert tensor._use_count() == 1 <= count
    other = tensor.view(2)
    assert other.untyped_storage()._cdata == storage
    assert torch_private.storage_use_count(storage) == count + 1
    assert other._is_view() and not tensor._is_view()
    assert torch_private.current_graph_task_id() == -1
    before = tensor._version
    assert tensor.add_(1)._version == before + 1


def test_an_op_tells_its_schema_and_whether_it_is_made_of_others():
    add = aten.add.Tensor
    assert isinstance(add, OpOverload) and add._opname == "add" and add._schema.name == "aten::add"
    assert [(each.name, str(each.type)) for each in add._schema.arguments][:2] == [
        *(("self", "Tensor"), ("other", "Tensor"))
    ]
    assert aten.silu_backward.default._can_decompose() in (True, False)


def test_registered_containers_are_taken_apart_and_put_together():
    node = SUPPORTED_NODES[dict]
    children, context = node.flatten_fn({"a": 1, "b": 2})
    assert list(children) == [1, 2]
    assert node.unflatten_fn(children, context) == {"a": 1, "b": 2}


def test_modules_keep_their_tensors_and_what_compiles_them():
    layer = nn.BatchNorm1d(2)
    assert list(layer._parameters) == ["weight", "bias"] and "running_mean" in layer._buffers
    assert isinstance(layer, torch_private.BatchNorm) and layer._compiled_call_impl is None
    assert torch.compile(layer)._orig_mod is layer


def test_the_memory_history_takes_these_arguments():
    record = parameters(torch_private.record_memory_history)
    assert record[0] == "enabled" or "args" in record
    inspect.signature(torch_private.record_memory_history).bind(
        "all", context=None, stacks="python", max_entries=1, device=0
    )
    assert parameters(torch_private.memory_snapshot)[0] == "device"


needs_distributed = pytest.mark.skipif(
    not dist.is_available(), reason="this PyTorch has no torch.distributed"
)


@needs_distributed
def test_fsdp2_looks_its_collectives_up_where_they_are_replaced():
    private = torch_private.fsdp2()
    assert len(private.collectives) == 3
    for name in (*private.collectives, "record_function"):
        assert reads(private.param_group, name) or reads(private.group_class, name)
    assert reads(private.fully_shard, private.default_mesh)
    inspect.signature(getattr(private.fully_shard, private.default_mesh)).bind()
    assert inspect.isfunction(private.group_class.__init__)


@needs_distributed
def test_dtensors_are_made_of_a_local_tensor_and_a_spec(monkeypatch):
    from torch.distributed.tensor import DeviceMesh, DTensor, Shard

    private = torch_private.fsdp2()
    infer = private.propagator._propagate_tensor_meta_non_cached
    assert parameters(infer) == ["self", "op_schema"]
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # init_process_group replaces it
    dist.init_process_group("fake", store=dist.HashStore(), rank=0, world_size=2)
    try:
        dist.group.WORLD._set_default_backend(dist.ProcessGroup.BackendType.CUSTOM)
        mesh = DeviceMesh("cpu", range(2))
        shard = DTensor.from_local(torch.ones(3), mesh, [Shard(0)])
        again = DTensor(shard._local_tensor, shard._spec, requires_grad=False)
    finally:
        dist.destroy_process_group()
        private.set_global_rank(-1)
    assert again.shape == (6,) and again._spec.placements == (Shard(0),)
    assert again._spec.mesh is mesh


@pytest.mark.slow
def test_the_environment_is_as_before_when_a_simulation_is_ready():
    code = (
        "import os; before = dict(os.environ); import torch; own = dict(os.environ) == before; "
        "import autobatch.devices.virtual.gpu, torch._dynamo; "
        "assert not own or dict(os.environ) == before"
    )
    env = {k: v for k, v in os.environ.items() if not k.startswith("TORCHINDUCTOR")}
    subprocess.run([sys.executable, "-c", code], check=True, env=env)
