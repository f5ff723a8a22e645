"""The key of a plan: the same for the same question in any process, another for any other."""

from __future__ import annotations

import dataclasses
import functools
import os
import random
import subprocess
import sys
import threading
import time
import warnings
from collections import namedtuple
from enum import Enum
from pathlib import Path

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from autobatch.devices.virtual.gpu import VirtualGpu
from autobatch.gpus.catalogue import find_gpu
from autobatch.tuning import cache
from autobatch.tuning.cache import find, folder, plan_key, store
from autobatch.workload.workload import Workload
from tests.support import ROOT
from tests.support.plans import example_plan

GPU = find_gpu("a100-40gb")
OPTIONS = {"target": 256, "world_size": 1, "headroom": 0.05, "driver": None}
WIDTH = 3


class Net(nn.Module):
    def __init__(self, width=8, p=0.1, tied=False, checkpointing=False):
        super().__init__()
        self.first = nn.Linear(4, width)
        self.second = nn.Linear(width, 4)
        self.third = nn.Linear(width, 4)
        self.drop = nn.Dropout(p)
        self.checkpointing = checkpointing
        self.register_buffer("scale", torch.ones(4))
        if tied:
            self.third.weight = self.second.weight

    def forward(self, x):
        y = checkpoint(self.first, x, use_reentrant=False) if self.checkpointing else self.first(x)
        return self.second(self.drop(y)) + self.third(y) * self.scale


def batch(n):
    return torch.zeros(n, 4), torch.zeros(n, 4)


def mse(model, batch):
    return F.mse_loss(model(batch[0]), batch[1])


def mae(model, batch):
    return F.l1_loss(model(batch[0]), batch[1])


def key(model=None, *, gpu=GPU, options=OPTIONS, **workload):
    workload = {"model": model or Net(), "batch": batch, "loss": mse} | workload
    return plan_key(Workload(**workload), gpu, options)


def is_unique(text):
    return text.startswith("0" * 32)


@pytest.fixture(autouse=True)
def plans(tmp_path, monkeypatch):
    monkeypatch.setenv("AUTOBATCH_CACHE_DIR", str(tmp_path / "plans"))
    return tmp_path / "plans"


# What does not change the key


def test_a_model_built_again_has_the_same_key_in_sha_256():
    assert key() == key() and len(key()) == 64 and not is_unique(key())


def test_values_of_weights_and_of_the_random_state_do_not_change_the_key():
    before = key()
    torch.manual_seed(random.randrange(2**30))
    model = Net()
    with torch.no_grad():
        model.first.weight.fill_(3)
    assert key(model) == before
    assert key(batch=lambda n: torch.rand(n, 4)) == key(batch=lambda n: torch.rand(n, 4))


def test_a_model_on_meta_or_in_eval_mode_has_the_same_key():
    with torch.device("meta"):
        on_meta = Net()
    assert key() == key(on_meta) == key(Net().eval())


def test_making_a_key_leaves_the_random_state_and_the_model_as_they_were():
    def noisy(n):
        return torch.rand(n, 4) * random.random() * float(numpy.random.rand())

    def draws():
        return torch.rand(1).item(), random.random(), numpy.random.rand()

    def seed():
        torch.manual_seed(1), random.seed(1), numpy.random.seed(1)

    seed()
    expected = draws()
    seed()
    model = Net()
    seed()
    key(model.eval(), batch=noisy)
    assert draws() == expected and not model.training


def test_a_hook_has_the_same_key_whatever_hooks_other_models_had():
    def hooked():
        model = Net()
        model.first.register_forward_hook(lambda module, args, kwargs, out: out, with_kwargs=True)
        return key(model)

    before = hooked()
    Net().register_forward_hook(lambda *_: None)
    assert hooked() == before != key()


def test_the_sources_of_a_gpus_figures_do_not_change_the_key():
    assert key(gpu=dataclasses.replace(GPU, sources={"a": "b"})) == key()


def test_a_simulated_run_does_not_change_the_key():
    class Saving(Net):
        def forward(self, x, y):
            return super().forward(x).mean() + y.mean()

    workload = Workload(model=Saving(checkpointing=True), batch=batch)
    before = plan_key(workload, GPU, OPTIONS)
    VirtualGpu(GPU).run(workload, micro_batch=2, accumulation_steps=1)
    assert plan_key(workload, GPU, OPTIONS) == before


def test_an_optimizers_first_use_does_not_change_the_key():
    class Mine(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {"lr": 1.0})

        def step(self, closure=None):
            return None

    before = key(optimizer=Mine)
    Mine(Net().parameters())
    assert key(optimizer=Mine) == before


# What changes it


def variants():
    def frozen(model):
        model.first.weight.requires_grad_(False)
        return model

    def extended(model, **attributes):
        for name, value in attributes.items():
            setattr(model, name, value)
        return model

    def hooked(model, hook):
        model.first.register_forward_hook(hook)
        return model

    def on_parameter(model):
        model.first.weight.register_post_accumulate_grad_hook(lambda p: None)
        return model

    def views(model):
        model.third.weight.data = model.second.weight.data
        return model

    def replaced(model):
        model.forward = functools.partial(Net.forward, model)
        return model

    point = namedtuple("point", "a b")
    color = Enum("color", "red blue")
    return {
        "width": lambda: key(Net(width=9)),
        "dropout": lambda: key(Net(p=0.2)),
        "checkpointing": lambda: key(Net(checkpointing=True)),
        "tying": lambda: key(Net(tied=True)),
        "shared memory": lambda: key(views(Net())),
        "requires_grad": lambda: key(frozen(Net())),
        "dtype": lambda: key(Net().half()),
        "memory format": lambda: key(extended(Net(), kernel=torch.zeros(2, 3).t())),
        "no memory format": lambda: key(extended(Net(), kernel=torch.zeros(3, 2))),
        "hook": lambda: key(hooked(Net(), lambda *_: None)),
        "other hook": lambda: key(hooked(Net(), lambda *_: 1)),
        "parameter's hook": lambda: key(on_parameter(Net())),
        "instance's forward": lambda: key(replaced(Net())),
        "integer": lambda: key(extended(Net(), extra=1)),
        "boolean": lambda: key(extended(Net(), extra=True)),
        "set": lambda: key(extended(Net(), extra={"a", "b", 3})),
        "other set": lambda: key(extended(Net(), extra={"a", "b", 4})),
        "named tuple": lambda: key(extended(Net(), extra=point(1, 2))),
        "list": lambda: key(extended(Net(), extra=[1, 2])),
        "enum": lambda: key(extended(Net(), extra=color.red)),
        "other enum": lambda: key(extended(Net(), extra=color.blue)),
        "array": lambda: key(extended(Net(), extra=numpy.arange(3))),
        "other array": lambda: key(extended(Net(), extra=numpy.arange(1, 4))),
        "device": lambda: key(extended(Net(), extra=torch.device("cuda"))),
        "other device": lambda: key(extended(Net(), extra=torch.device("cpu"))),
        "loss": lambda: key(loss=mae),
        "no loss": lambda: key(loss=None),
        "loss's closure": lambda: key(loss=scaled(2)),
        "other closure": lambda: key(loss=scaled(3)),
        "closure's module": lambda: key(loss=distilled(nn.Linear(4, 4))),
        "closure's other module": lambda: key(loss=distilled(nn.Linear(4, 4, bias=False))),
        "partial": lambda: key(loss=functools.partial(weighted, weight=2)),
        "other partial": lambda: key(loss=functools.partial(weighted, weight=3)),
        "default": lambda: key(loss=weighted),
        "callable": lambda: key(loss=Criterion(1)),
        "other callable": lambda: key(loss=Criterion(2)),
        "bound method": lambda: key(loss=Criterion(1).__call__),
        "evaluate": lambda: key(evaluate=mse),
        "optimizer": lambda: key(optimizer=torch.optim.SGD),
        "optimizer's options": lambda: key(optimizer=lambda p: torch.optim.SGD(p, momentum=0.9)),
        "other options": lambda: key(optimizer=functools.partial(torch.optim.AdamW, foreach=True)),
        "fused": lambda: key(optimizer=functools.partial(torch.optim.AdamW, fused=True)),
        "batch's shape": lambda: key(batch=lambda n: (torch.zeros(n, 5), torch.zeros(n, 4))),
        "batch's dtype": lambda: key(batch=lambda n: (torch.zeros(n, 4).half(), torch.zeros(n, 4))),
        "batch's values": lambda: key(batch=lambda n: (torch.zeros(n, 4), 1)),
        "batch's other values": lambda: key(batch=lambda n: (torch.zeros(n, 4), 2)),
        "batch's names": lambda: key(batch=lambda n: {"x": torch.zeros(n, 4)}),
        "larger batches": lambda: key(batch=lambda n: batch(n) if n < 3 else batch(2 * n)),
        "autocast": lambda: key(autocast="bf16"),
        "clip_norm": lambda: key(clip_norm=1.0),
        "sample_limit": lambda: key(sample_limit=100),
        "notes": lambda: key(notes=("a warning",)),
        "capacity": lambda: key(gpu=dataclasses.replace(GPU, capacity_bytes=2**34)),
        "option": lambda: key(options=OPTIONS | {"target": 512}),
        "option's type": lambda: key(options=OPTIONS | {"world_size": 1.0}),
    }


def scaled(factor):
    return lambda model, batch: mse(model, batch) * factor


def distilled(teacher):
    return lambda model, batch: F.mse_loss(model(batch[0]), teacher(batch[0]))


def weighted(model, batch, weight=1):
    return mse(model, batch) * weight


class Criterion:
    def __init__(self, weight):
        self.weight = weight

    def __call__(self, model, batch):
        return mse(model, batch) * self.weight


def test_every_variant_has_a_key_of_its_own_and_keeps_it():
    keys = {"plain": key()} | {name: make() for name, make in variants().items()}
    assert [name for name, text in keys.items() if is_unique(text)] == []
    assert len(set(keys.values())) == len(keys)
    assert {name: make() for name, make in variants().items()} == {
        name: text for name, text in keys.items() if name != "plain"
    }


def test_an_optimizer_counts_with_its_options_parameters_and_state():
    def made(kind=torch.optim.AdamW, parameters=lambda m: m.parameters(), steps=0, **options):
        model = Net()
        optimizer = kind(parameters(model), **options)
        for _ in range(steps):
            model(torch.rand(2, 4)).sum().backward()
            optimizer.step()
        model.zero_grad()
        return key(model, optimizer=optimizer)

    assert made() == made() and made(steps=1) == made(steps=2)
    keys = [
        made(),
        made(torch.optim.Adam),
        made(steps=1),
        made(lr=1.0),
        made(foreach=True),
        made(fused=True),
        made(weight_decay=0.0),
        made(parameters=lambda model: model.first.parameters()),
        made(parameters=lambda model: [model.second.weight]),
        made(parameters=lambda model: [model.third.weight]),
        made(parameters=lambda model: [{"params": [p]} for p in model.parameters()]),
    ]
    assert len(set(keys)) == len(keys) and not any(map(is_unique, keys))


def test_a_scheduler_does_not_make_an_optimizer_unknown():
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    assert schedule and not is_unique(key(model, optimizer=optimizer))


def test_a_global_that_the_loss_uses_counts(monkeypatch):
    def loss(model, batch):
        return mse(model, batch) * WIDTH

    before = key(loss=loss)
    monkeypatch.setitem(globals(), "WIDTH", 4)
    assert key(loss=loss) != before == before
    monkeypatch.setitem(globals(), "WIDTH", 3)
    assert key(loss=loss) == before


def test_a_function_replaced_anywhere_below_the_loss_counts(monkeypatch):
    before = key(loss=weighted)
    monkeypatch.setitem(globals(), "mse", mae)
    assert key(loss=weighted) != before


def test_a_method_replaced_in_a_library_counts(monkeypatch):
    before = key()
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: F.linear(x, self.weight))
    assert key() != before


def test_a_function_replaced_in_a_librarys_module_counts(monkeypatch):
    before = key()
    monkeypatch.setattr(F, "mse_loss", lambda a, b: (a - b).square().mean())
    assert key() != before


@pytest.mark.parametrize(
    "name",
    """PYTORCH_CUDA_ALLOC_CONF PYTORCH_ALLOC_CONF CUBLAS_WORKSPACE_CONFIG
    TORCH_CUBLASLT_UNIFIED_WORKSPACE CUDNN_CONV_WSCAP_DBG""".split(),
)
def test_settings_of_the_environment_count(monkeypatch, name):
    before = key()
    monkeypatch.setenv(name, "1")
    assert key() != before


def test_an_environment_variable_that_the_model_reads_counts(monkeypatch):
    def loss(model, batch):
        return mse(model, batch) * int(os.environ.get("MY_CHUNKS", "1"))

    before = key(loss=loss)
    monkeypatch.setenv("MY_CHUNKS", "2")
    assert key(loss=loss) != before


def test_switches_of_torch_count():
    for owner, name in (
        (torch.backends.cudnn, "benchmark"),
        (torch.backends.cudnn, "deterministic"),
        (torch.backends.cudnn, "allow_tf32"),
        (torch.backends.cuda.matmul, "allow_tf32"),
    ):
        before, usual = key(), getattr(owner, name)
        setattr(owner, name, not usual)
        try:
            assert key() != before, name
        finally:
            setattr(owner, name, usual)
    before = key()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert key() != before


def test_hooks_on_all_modules_count():
    before = key()
    hook = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert key() != before
    finally:
        hook.remove()


# What cannot be described


class Opaque(threading.local):
    pass


@pytest.mark.parametrize(
    "value",
    [Opaque(), threading.Lock(), {object()}, torch.zeros(2, 2).to_sparse(), (x for x in "ab")],
    ids=lambda value: type(value).__name__,
)
def test_what_cannot_be_described_makes_every_key_unique_and_is_not_stored(value, plans):
    model = Net()
    model.extra = value
    first, second = key(model), key(model)
    assert is_unique(first) and is_unique(second) and first != second
    store(first, example_plan())
    assert find(first) is None and not plans.exists()


def test_a_batch_function_that_fails_makes_the_key_unique():
    def broken(n):
        raise ValueError("no data")

    assert is_unique(key(batch=broken))


# Between processes

SCRIPT = """
import sys
sys.path[:0] = [{folder!r}]
import torch
from torch import nn
import user_model
from autobatch.tuning.cache import plan_key
from autobatch.gpus.catalogue import find_gpu
from autobatch.workload.workload import Workload
nn.Linear(1, 1).register_forward_hook(print) if "history" in sys.argv else None
model = user_model.Net()
if "transformers" in sys.argv:
    import transformers
    config = transformers.AutoConfig.for_model("gpt2", n_layer=1, n_embd=16, n_head=2)
    model.inner = transformers.AutoModelForCausalLM.from_config(config)
workload = Workload(
    model=model, batch=lambda n: {{"x": torch.rand(n, 4), "s": {{"a", "b", "c"}}}},
    loss=user_model.loss,
)
print(plan_key(workload, find_gpu("a100-40gb"), {{"target": 256, "names": ("x", None)}}))
"""

USER_MODEL = """
from torch import nn
import user_helper

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.names = {"one", "two", "three"}

    def forward(self, x, s):
        return user_helper.widen(self.layer(x))

def loss(model, batch):
    LAZY
    return model(**batch).sum()
"""


def key_in_a_fresh_process(home: Path, *arguments: str) -> str:
    script = SCRIPT.format(folder=str(home))
    environment = {**os.environ, "PYTHONHASHSEED": str(random.randrange(1000))}
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True, text=True, check=True, env=environment, cwd=ROOT,
    )  # fmt: skip
    return done.stdout.strip()


@pytest.fixture
def user_folder(tmp_path):
    (tmp_path / "user_model.py").write_text(USER_MODEL.replace("LAZY", "pass"))
    (tmp_path / "user_helper.py").write_text("def widen(x):\n    return x.repeat(1, 2)\n")
    (tmp_path / "user_lazy.py").write_text("def widen(x):\n    return x\n")
    return tmp_path


@pytest.mark.slow
def test_a_fresh_process_gives_the_same_key_until_a_helper_that_forward_calls_is_edited(
    user_folder,
):
    before = key_in_a_fresh_process(user_folder)
    assert key_in_a_fresh_process(user_folder, "history") == before and not is_unique(before)
    (user_folder / "user_helper.py").write_text("def widen(x):\n    return x.repeat(1, 3)\n")
    assert key_in_a_fresh_process(user_folder) != before


@pytest.mark.slow
def test_a_model_of_transformers_has_the_same_key_in_a_fresh_process(user_folder):
    pytest.importorskip("transformers")
    first, second = (key_in_a_fresh_process(user_folder, "transformers") for _ in range(2))
    assert first == second and not is_unique(first)


@pytest.mark.slow
def test_a_users_module_that_is_imported_later_makes_the_key_unique(user_folder):
    lazy = USER_MODEL.replace("LAZY", "from user_lazy import widen")
    (user_folder / "user_model.py").write_text(lazy)
    assert is_unique(key_in_a_fresh_process(user_folder))
    (user_folder / "user_model.py").write_text(USER_MODEL.replace("LAZY", "import json"))
    assert not is_unique(key_in_a_fresh_process(user_folder))


def test_a_thousand_modules_on_meta_take_less_than_a_second():
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(333)))
    key(model)
    started = time.perf_counter()
    key(model)
    assert time.perf_counter() - started < 1


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_models_of_transformers_have_stable_keys(kind):
    transformers = pytest.importorskip("transformers")

    def make(device="cpu", **changes):
        sizes = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2}
        config = transformers.AutoConfig.for_model(kind, vocab_size=30, **sizes | changes)
        with torch.device(device):
            return transformers.AutoModelForCausalLM.from_config(config)

    saving = make()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it has another name from transformers 5 on
        saving.gradient_checkpointing_enable()
    keys = [key(make()), key(saving), key(make(attn_implementation="eager"))]
    assert len(set(keys)) == 3 and not any(map(is_unique, keys))
    assert key(make("meta")) == key(make()) == keys[0]


def test_models_of_timm_have_stable_keys():
    timm = pytest.importorskip("timm")

    def make(**options):
        with torch.device("meta"):
            return timm.create_model("resnet18", **options)

    assert key(make()) == key(make()) != key(make(drop_rate=0.1))
    assert not is_unique(key(make()))


# Files


def test_a_stored_plan_is_found_equal_under_its_key_only(plans):
    assert find("a" * 64) is None
    store("a" * 64, example_plan())
    assert find("a" * 64) == example_plan() and find("b" * 64) is None
    assert [file.name for file in plans.iterdir()] == ["a" * 64 + ".json"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema_version": 99}', "\x00"])
def test_a_broken_entry_is_a_miss_and_is_removed(plans, text):
    plans.mkdir()
    file = plans / "a.json"
    file.write_text(text)
    assert find("a") is None and not file.exists()


def test_a_folder_that_cannot_be_made_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("AUTOBATCH_CACHE_DIR", str(tmp_path / "file" / "plans"))
    store("a", example_plan())
    assert find("a") is None


def test_the_least_recently_used_plan_goes_first(plans, monkeypatch):
    monkeypatch.setattr(cache, "ENTRIES_KEPT", 3)
    for age, name in enumerate("abc"):
        store(name, example_plan())
        os.utime(plans / f"{name}.json", (age, age))
    assert find("a") is not None  # now the latest
    store("d", example_plan())
    assert sorted(file.stem for file in plans.iterdir()) == ["a", "c", "d"]


def test_what_was_just_stored_stays_even_where_clocks_disagree(plans, monkeypatch):
    monkeypatch.setattr(cache, "ENTRIES_KEPT", 1)
    store("a", example_plan())
    os.utime(plans / "a.json", (2**33, 2**33))
    store("b", example_plan())
    assert [file.stem for file in plans.iterdir()] == ["b"]


def test_the_folder_is_the_one_named_or_the_systems(monkeypatch, tmp_path):
    assert folder() == tmp_path / "plans"
    monkeypatch.delenv("AUTOBATCH_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert folder() == tmp_path / "autobatch" / "plans"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    homes = {"Linux": ".cache", "Darwin": "Library/Caches", "Windows": "local"}
    for system, home in homes.items():
        monkeypatch.setattr(cache.platform, "system", lambda system=system: system)
        assert folder() == tmp_path / home / "autobatch" / "plans"
