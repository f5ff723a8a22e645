from __future__ import annotations

import os
import subprocess
import sys

import pytest

from autobatch.cli import importing
from autobatch.cli.importing import require_importable_torch
from autobatch.errors import UsageError
from autobatch.memory.allocator_settings import VARIABLES, is_well_formed


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("text", ["nonsense", "expandable_segments", ",", "a:[b", ":True", "a:b:c"])
@pytest.mark.parametrize("name", VARIABLES)
def test_a_text_of_another_form_is_refused_where_pytorch_aborts(
    name: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, text)
    monkeypatch.setattr(importing, "_import_aborts", lambda: True)
    with pytest.raises(UsageError) as caught:
        require_importable_torch()
    assert str(caught.value).startswith(f"{name} is {text!r}, with which PyTorch aborts")
    monkeypatch.setattr(importing, "_import_aborts", lambda: False)
    require_importable_torch()


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "a:b",
        "expandable_segments:True, max_split_size_mb:128,",
        "roundup_power2_divisions:[64:8,>:1],a:b",
    ],
)
def test_the_documented_form_costs_no_import(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLES[0], text)
    monkeypatch.setattr(importing, "_import_aborts", lambda: pytest.fail("it imports"))
    require_importable_torch()


@pytest.mark.slow
@pytest.mark.parametrize("text", ["max_split_size_mb:x", "a:b", "roundup_power2_divisions:[a:b]"])
def test_pytorch_can_be_imported_with_what_is_well_formed(text: str) -> None:
    assert is_well_formed(text)
    environment = {**os.environ, VARIABLES[1]: text}
    subprocess.run([sys.executable, "-c", "import torch"], env=environment, check=True)


def test_the_check_itself_imports_no_torch() -> None:
    code = "import autobatch.cli.importing, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
