"""Plans that are answered from a file: for the same call only, and never in silence."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import autobatch
from autobatch.cli import main
from autobatch.devices import preserve
from autobatch.devices.preserve import kernel_switches
from autobatch.errors import FileError, UsageError
from autobatch.tuning import cache
from autobatch.tuning.cache import CacheEntry, named_entry
from tests.support import ROOT
from tests.support.plans import example_plan

REST = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
QUESTION = {"spec": "timm:resnet50", "target": 256}


class Net(nn.Module):
    def __init__(self, width: int = 8, recompute: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, width), nn.Linear(width, 4)
        self.recompute = recompute
        self.register_buffer("order", torch.arange(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def loss_of(scale: float = 1.0) -> Any:
    return lambda model, x: model(x).square().mean() * scale


def tune(file: Path, model: nn.Module | None = None, **options: Any) -> autobatch.Plan:
    given = {"target": 64, "sample": torch.zeros(4, 4), "loss": loss_of(), "gpu": "t4"}
    return autobatch.tune(model or Net(), cache=file, **given | options)


def is_known(plan: autobatch.Plan) -> bool:
    return any(warning.startswith("answered from") for warning in plan.notes)


def test_the_same_call_is_answered_from_the_file_and_says_so(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    first, second = tune(file), tune(file)
    assert not is_known(first)
    assert f"answered from {str(file)!r}, the plan of {first.created}" in second.notes[-1]
    assert (second.split, second.trials) == (first.split, first.trials)


def frozen() -> nn.Module:
    model = Net()
    model.first.requires_grad_(False)
    return model


def reordered() -> nn.Module:
    model = Net()
    model.order += 1
    return model


CHANGES: dict[str, dict[str, Any]] = {
    "the target": {"target": 65},
    "the card": {"gpu": "a100-40gb"},
    "the size of a card": {"gpu": "15GiB"},
    "the headroom": {"headroom": 0.3},
    "a proof": {"prove": True},
    "precision": {"autocast": "fp16"},
    "clipping": {"clip_norm": 1.0},
    "ranks": {"world_size": 2},
    "the optimizer": {"optimizer": torch.optim.SGD},
    "a number that the loss holds": {"loss": loss_of(2.0)},
    "the shape of the batch": {"sample": torch.zeros(4, 2, 4)},
    "a layer": {"model": Net(width=16)},
    "a switch of a module": {"model": Net(recompute=True)},
    "what is trained": {"model": frozen()},
    "values of a small buffer of whole numbers": {"model": reordered()},
}


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_another_question_is_probed(change: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    tune(file)
    assert not is_known(tune(file, **change))
    assert is_known(tune(file, **change))


def test_options_of_an_optimizer_instance_count(tmp_path: Path) -> None:
    def run(foreach: bool) -> autobatch.Plan:
        model = Net()
        optimizer = torch.optim.Adam(model.parameters(), foreach=foreach)
        return tune(tmp_path / "plan.json", model, optimizer=optimizer)

    assert not is_known(run(True))
    assert not is_known(run(False))
    assert is_known(run(False))


def test_values_of_weights_do_not_count(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    tune(file, Net())
    assert is_known(tune(file, Net()))


def test_without_a_file_nothing_is_kept() -> None:
    for cache_ in (None, False):
        plan = autobatch.tune(Net(), target=64, sample=torch.zeros(4, 4), gpu="t4", cache=cache_)
        assert not is_known(plan)
    assert not list(Path(os.environ["AUTOBATCH_CACHE_DIR"]).iterdir())


def test_a_file_has_to_be_named_and_writable(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cache is True: name a file"):
        autobatch.tune(Net(), target=64, sample=torch.zeros(4, 4), gpu="t4", cache=True)  # type: ignore[arg-type]
    with pytest.raises(FileError, match="cannot write the file"):
        tune(tmp_path / "missing" / "plan.json")


@pytest.mark.slow
def test_an_interactive_session_has_no_source_files_to_compare(tmp_path: Path) -> None:
    code = b"import autobatch, torch; autobatch.tune(torch.nn.Linear(1, 1), target=2, cache='x')"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    said = subprocess.run(
        [sys.executable, "-"], input=code, cwd=tmp_path, env=environment, capture_output=True
    )
    assert b"keep the plan with plan.save(file)" in said.stderr


# Entries


def test_an_entry_holds_the_question_in_plain_text(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    CacheEntry(file, QUESTION).store(example_plan())
    entry = json.loads(file.read_text())
    assert entry["question"]["target"] == 256
    assert entry["question"]["packages"]["torch"] == version("torch")
    assert str(Path(__file__).resolve()) in entry["sources"]
    assert CacheEntry(file, QUESTION).find() is not None
    assert CacheEntry(file, {**QUESTION, "target": 257}).find() is None


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "CUBLAS_WORKSPACE_CONFIG"])
def test_settings_of_the_environment_count(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    CacheEntry(tmp_path / "plan.json", QUESTION).store(example_plan())
    monkeypatch.setenv(name, "expandable_segments:True")
    assert CacheEntry(tmp_path / "plan.json", QUESTION).find() is None


@pytest.mark.parametrize("switches", [{"set_priority": True}, {}])
def test_switches_of_the_process_count(switches: dict[str, bool], tmp_path: Path) -> None:
    tune(tmp_path / "plan.json")
    with sdpa_kernel([SDPBackend.MATH, SDPBackend.FLASH_ATTENTION], **switches):
        assert not is_known(tune(tmp_path / "plan.json"))


def test_the_order_that_pytorch_sets_by_itself_does_not_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = kernel_switches()
    kernels = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, *REST]
    with sdpa_kernel(kernels, set_priority=True):
        assert kernel_switches() != before
        monkeypatch.setattr(preserve, "_is_cuda_initialized", lambda: True)
        monkeypatch.setattr(preserve, "_real_capability", lambda: (9, 0))
        assert kernel_switches() == before
        monkeypatch.setattr(preserve, "_real_capability", lambda: (8, 0))
        assert kernel_switches() != before


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"question": {}}', "\x00"])
def test_a_broken_entry_is_a_miss(text: str, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(text)
    assert CacheEntry(tmp_path / "plan.json", QUESTION).find() is None


def test_the_least_recently_used_entry_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "ENTRIES_KEPT", 3)
    for target in range(4):
        entry = named_entry({"target": target})
        assert entry is not None
        entry.store(example_plan())
        os.utime(entry._file, (target, target))
    first = named_entry({"target": 0})
    assert first is not None and first.find() is None
    last = named_entry({"target": 3})
    assert last is not None and last.find() is not None


def test_a_folder_that_cannot_be_made_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("AUTOBATCH_CACHE_DIR", str(tmp_path / "file"))
    assert named_entry(QUESTION) is None


# The command line


@pytest.fixture
def spec(tmp_path: Path) -> str:
    (tmp_path / "user_part.py").write_text("WIDTH = 8\n")
    (tmp_path / "user_spec.py").write_text(
        "from torch import nn\nfrom user_part import WIDTH\n"
        "def make(): return nn.Sequential(nn.Linear(4, WIDTH), nn.Linear(WIDTH, 4))\n"
    )
    return f"{tmp_path / 'user_spec.py'}:make"


@pytest.mark.slow
def test_the_command_answers_again_until_an_option_or_a_file_of_the_spec_changes(
    spec: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def is_answered(*options: str) -> bool:
        assert main(["probe", spec, "--target", "64", "--gpu", "t4", *options]) == 0
        return "answered from" in capsys.readouterr().out

    assert not is_answered()
    assert is_answered()
    here = "--no-isolate"  # which is no part of the question, and takes no new process
    assert is_answered(here)
    assert not is_answered("--no-cache", here)
    assert not is_answered("--headroom", "0.2", here)
    part = Path(spec.partition(":")[0]).with_name("user_part.py")
    part.write_text("WIDTH = 16\n")  # the SPEC's own file is as it was
    assert not is_answered()
    assert is_answered()


def test_a_config_beside_the_command_counts(tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("transformers")
    config = tmp_path / "config.json"
    sizes = {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 64}
    outputs = []
    for layers in (1, 1, 2):
        config.write_text(json.dumps({**sizes, "n_layer": layers}))
        command = ["probe", f"hf:{tmp_path}?seq=16", "--target", "64", "--gpu", "t4"]
        assert main([*command, "--no-isolate"]) == 0
        outputs.append(capsys.readouterr().out)
    assert ["answered from" in output for output in outputs] == [False, True, False]


TIMES = 1


class Repeating(Net):
    times = 1

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times * TIMES):
            x = super().forward(x)
        return x


def test_what_code_reads_is_part_of_the_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def known() -> bool:
        return is_known(tune(tmp_path / "plan.json", Repeating()))

    assert [known(), known()] == [False, True]
    monkeypatch.setattr(Repeating, "times", 2)
    assert [known(), known()] == [False, True]
    monkeypatch.setattr(sys.modules[__name__], "TIMES", 2)
    assert [known(), known()] == [False, True]
