from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from autobatch.cli import checkup as look
from autobatch.cli import main
from autobatch.gpus import nvml
from autobatch.support.installing import install_line


def found(capsys: pytest.CaptureFixture[str], code: int = 0) -> dict[str, Any]:
    assert main(["doctor", "--json", "-"]) == code
    document = json.loads(capsys.readouterr().out)
    assert document["healthy"] is (code == 0)
    return {finding["name"]: finding for finding in document["findings"]}


def test_a_sound_machine_is_called_so(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AUTOBATCH_CACHE_DIR", str(tmp_path))
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "plans").mkdir()
    (tmp_path / "plans" / "x.json").write_text("x" * 2048)
    findings = found(capsys)
    assert "2.00 KiB, 1 plan" in findings["cache"]["value"]
    assert findings["settings"]["value"] == "none: PyTorch's defaults"
    assert findings["two windows of a linear layer on a T4"]["value"].startswith("works, in ")
    assert findings["needed"]["verdict"] == "ok"
    assert main(["doctor"]) == 0
    assert capsys.readouterr().out.startswith("All that autobatch needs is here\n")


def test_a_missing_extra_is_a_note_with_the_line_that_installs_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    version = look._version
    monkeypatch.setattr(look, "_version", lambda name: None if name == "peft" else version(name))
    finding = found(capsys)["extra lora"]
    assert finding["verdict"] == "note" and "peft" in finding["value"]
    assert finding["advice"] == install_line("lora")
    assert main(["doctor"]) == 0
    assert f"    {install_line('lora')}\n" in capsys.readouterr().out


def test_what_is_needed_and_missing_is_a_problem(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    version = look._version
    monkeypatch.setattr(look, "_version", lambda name: "0.1" if name == "rich" else version(name))
    finding = found(capsys, 1)["needed"]
    assert finding["verdict"] == "problem" and "rich>=13" in finding["value"]


@pytest.mark.parametrize(
    ("text", "code", "verdict"),
    [
        ("expandable_segments:True", 0, "ok"),
        ("backend:native", 0, "note"),
        ("max_split_size_mb:x", 1, "problem"),
    ],
)
def test_settings_of_the_allocator_are_read(
    text: str,
    code: int,
    verdict: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", text)
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:128")
    monkeypatch.setattr(look, "_simulation", lambda: iter(()))
    findings = found(capsys, code)
    assert findings["PYTORCH_ALLOC_CONF"]["verdict"] == verdict
    assert "PYTORCH_ALLOC_CONF is set, too" in findings["PYTORCH_CUDA_ALLOC_CONF"]["advice"]


def test_a_card_that_pytorch_cannot_use_is_a_problem(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    card = nvml.InstalledGpu(index=0, name="NVIDIA Test", total_bytes=2**34, used_bytes=0)
    monkeypatch.setattr(nvml, "installed_gpus", lambda: (card,))
    monkeypatch.setattr(look, "_cards_of_torch", lambda: 0)
    findings = found(capsys, 1)
    assert findings["cuda:0"]["value"] == "NVIDIA Test, 16.0 GiB"
    assert findings["PyTorch"]["verdict"] == "problem"
    monkeypatch.setattr(look, "_cards_of_torch", lambda: 1)
    assert "measures there" in found(capsys)["PyTorch"]["value"]


def test_a_simulation_that_fails_or_miscounts_is_a_problem(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(look, "_TESTED_BYTES", 1)
    assert "and there are 1" in found(capsys, 1)["two windows of a linear layer on a T4"]["value"]

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr("autobatch.tuning.tuner.predict", fail)
    finding = found(capsys, 1)["two windows of a linear layer on a T4"]
    assert finding["value"] == "RuntimeError: broken"
