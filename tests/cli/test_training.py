"""Precision, checkpointing, LoRA and inputs, as a command asks for them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from autobatch.cli import main
from autobatch.cli.training import Lora, Training, training_of
from autobatch.errors import UsageError
from autobatch.gpus.catalogue import find_gpu
from autobatch.plan.plan import Plan

A10G, T4 = find_gpu("a10g"), find_gpu("t4")

SPEC = """
import torch
from torch import nn
import autobatch

class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width)
    def forward(self, x):
        return self.down(nn.functional.gelu(self.up(x)))

class Blocks(nn.Module):
    def __init__(self, width=64):
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(4))
    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x

def build(width=64):
    batch = lambda n: torch.zeros(n, width)
    return autobatch.Workload(
        model=Blocks(width), batch=batch, loss=lambda m, b: m(b).square().mean()
    )

class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(16, 3))
    def forward(self, image):
        return image.flatten(1) @ self.weight

def sample():
    return torch.ones(2, 4, 4), torch.zeros(2, dtype=torch.int64)
"""


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "m.py").write_text(SPEC)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def answer(capsys: pytest.CaptureFixture[str], verb: str, *options: str) -> dict[str, object]:
    size = ["--micro-batch", "512"] if verb == "predict" else ["--target", "512"]
    gpu = [] if "--gpus" in options else ["--gpu", "a10g"]
    words = [verb, *options, *gpu, *size, "--no-isolate", "--json", "-"]
    assert main(words) == 0, capsys.readouterr().err
    found: dict[str, object] = json.loads(capsys.readouterr().out)
    return found


def test_each_setting_changes_the_copy_and_is_told_as_a_note(
    spec: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = answer(capsys, "predict", "m.py:build")
    saved = answer(capsys, "predict", "m.py:build", "--activation-checkpointing")
    halved = answer(capsys, "predict", "m.py:build", "--precision", "bf16-pure")
    assert plain["notes"] == []
    assert int(str(saved["activations_bytes"])) < int(str(plain["activations_bytes"]))
    assert int(str(halved["parameters_bytes"])) * 2 == int(str(plain["parameters_bytes"]))
    assert "with checkpointing: every block: " in str(saved["notes"])
    assert "`import torch; model = model.to(torch.bfloat16)" in str(halved["notes"])


def test_a_plan_has_the_levers_that_the_command_asked_for(
    spec: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--precision", "bf16-pure", "--activation-checkpointing", "every=2"]
    words = "probe m.py:build --target 512 --gpu a10g --no-isolate --no-cache --report out".split()
    assert main([*words, *asked]) == 0, capsys.readouterr().err
    plan = Plan.load("out/plan.json")
    labels = ["precision: bf16 weights", "checkpointing: every 2nd block"]
    assert [lever.label for lever in plan.levers] == labels
    for text in (Path("out/report.md").read_text(), Path("out/report.html").read_text()):
        assert "; ".join(labels) in text and "model = model.to(torch.bfloat16)" in text
    plain = [lever.label for lever in Training(precision="tf32").of(levers_model(), [A10G]).levers]
    assert plain == ["precision: tf32"]
    assert Training(precision="bf16").of(levers_model(), [A10G]).levers == ()  # the plan says it


def levers_model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))


def test_lora_trains_the_matrices_alone(spec: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("peft")
    found = answer(capsys, "predict", "m.py:build", "--lora", "r=2")
    plain = answer(capsys, "predict", "m.py:build")
    assert int(str(found["optimizer_bytes"])) < int(str(plain["optimizer_bytes"])) / 2
    assert "LoraConfig(r=2" in str(found["notes"])
    wanted = Training(lora=Lora(2, ("zz",)))
    layers = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    with pytest.raises(UsageError, match="its linear layers are 0, 2"):
        wanted.of(layers, [A10G])


@pytest.mark.slow
@pytest.mark.parametrize(
    "more", [["vary", "--vary", "width=32,64"], ["compare", "--gpus", "t4,a10g"], ["advise"]]
)
def test_settings_go_with_commands_of_many_plans(
    more: list[str], spec: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    verb, *options = more
    levers = ["--levers", "checkpointing,precision"] if verb == "advise" else []
    setting = ["--activation-checkpointing", "every=2", *levers]
    found = answer(capsys, verb, "m.py:build", *options, *setting)
    assert "with checkpointing: every 2nd block" in json.dumps(found)
    assert "checkpointing: every block" not in json.dumps(found)


@pytest.mark.parametrize("how", [["--input-shape", "4x4,int64"], ["--sample", "m.py:sample"]])
def test_inputs_that_are_not_inferred_are_said(
    how: list[str], spec: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", "m.py:Odd", "--micro-batch", "8", "--gpu", "t4", "--no-isolate"]) == 2
    assert "cannot be inferred" in capsys.readouterr().err
    found = answer(capsys, "probe", "m.py:Odd", "--no-cache", *how)
    assert "cross entropy" in json.dumps(found)
    assert main(["check", "m.py:Odd", *how, "--no-isolate"]) == 0


def test_check_compares_the_model_as_levers_change_it(
    spec: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("peft")
    words = ["--lora", "r=2", "--activation-checkpointing", "--precision", "bf16"]
    assert main(["check", "m.py:build", *words, "--no-isolate", "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert main(["check", "m.py:build", "--no-isolate", "--json", "-"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert found["equivalent"] and plain["equivalent"]
    assert found["rounding"] is not None and plain["rounding"] is None
    assert len(found["parameters"]) == 4 * 2 * 2  # two matrices beside two layers of each block
    assert all("lora_" in name for name in found["parameters"])
    told = [note for note in found["notes"] if note.startswith("with ")]
    assert len(told) == 2 and any("checkpointing" in note for note in told)
    assert len(plain["parameters"]) == 4 * 2 * 2  # weights and biases


def test_changes_of_a_workload_are_not_left_out_of_a_comparison_in_silence() -> None:
    from autobatch import Workload, check_equivalence

    workload = Workload(
        model=nn.Linear(2, 2), batch=lambda n: torch.ones(n, 2), changes=(lambda model: None,)
    )
    with pytest.raises(
        UsageError, match="has 1 change of its model, which a comparison leaves out"
    ):
        check_equivalence(workload)


def test_the_precision_of_products_is_put_back(
    spec: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = torch.get_float32_matmul_precision()
    found = answer(capsys, "predict", "m.py:build", "--precision", "tf32")
    assert torch.get_float32_matmul_precision() == before
    assert 'torch.set_float32_matmul_precision("high")' in str(found["notes"])


def test_fp32_takes_a_workloads_own_autocast_away(spec: Path) -> None:
    from autobatch.workload.workload import Workload

    own = Workload(model=nn.Linear(2, 2), batch=lambda n: torch.ones(n, 2), autocast="bf16")
    assert Training(precision="fp32").of(own, [T4]).autocast is None
    assert Training(precision="fp16").of(own, [T4]).autocast == "fp16"
    assert own.autocast == "bf16"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--activation-checkpointing", "ful"], "is 'ful' (did you mean full"),
        (["--activation-checkpointing", "every=9"], "use none, full, selective, every=2"),
        (["--activation-checkpointing", "every=4"], "it can be 'every block', 'every 2nd block'"),
        (["--lora", "r=x"], "--lora is 'r=x': write r=16"),
        (["--lora", "r=0"], "--lora is 'r=0': write r=16"),
        (["--lora", "r=2,rank=3"], "has no 'rank'"),
        (["--lora", "targets=a"], "write r=16"),
        (["--lora", "r=2,targets="], "write r=16"),
        (["--precision", "tf23"], "did you mean tf32"),
        (["--precision", "bf16", "--autocast", "bf16"], "not allowed with"),
        (["--input-shape", "3", "--sample", "x.pt"], "not allowed with"),
        (["--vary", "width=1,2", "--input-shape", "3"], "leave them out with --vary"),
        (["--gpu", "t4", "--precision", "tf32"], "which t4 has no tensor cores for"),
    ],
)
def test_what_cannot_be_had_is_refused_in_one_line(
    options: list[str], words: str, spec: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["probe", "m.py:build", "--target", "8", "--gpu", "a10g", "--no-isolate"]
    assert main([*command, *options]) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert words in err and err.startswith("autobatch")


def test_a_model_without_blocks_cannot_be_checkpointed() -> None:
    with pytest.raises(UsageError, match="for Linear: no repeated blocks were found in it"):
        Training(checkpointing="every block").of(nn.Linear(2, 2), [T4])


def test_nothing_is_said_by_default() -> None:
    from autobatch.cli.parser import parsed

    assert training_of(parsed(["probe", "m.py:f", "--target", "8"])).says_nothing
    assert training_of(parsed(["check", "m.py:f"])).says_nothing
    none = parsed(["probe", "m.py:f", "--target", "8", "--activation-checkpointing", "none"])
    assert training_of(none).says_nothing
