from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from autobatch.cli import main
from autobatch.cli.parser import parsed


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "run.toml"


def test_options_come_from_the_file_and_what_is_typed_wins(file: Path) -> None:
    file.write_text(
        'spec = "m.py:f"\ntarget = 64\nclip_norm = 1.5\nprove = true\nno-cache = false\n'
        'input-shape = ["3x8x8", "int64"]\nactivation-checkpointing = true\nlora = "r=8"\n'
    )
    found = parsed(["probe", "--config", str(file), "--target", "128", "--lora=r=4"])
    assert (found.spec, found.target, found.clip_norm) == ("m.py:f", 128, 1.5)
    assert (found.prove, found.no_cache) == (True, False)
    assert found.input_shape == ["3x8x8", "int64"]
    assert (found.activation_checkpointing, found.lora) == ("full", "r=4")
    typed = parsed(["probe", "n.py:g", "--config", str(file), "--input-shape", "5"])
    assert (typed.spec, typed.input_shape) == ("n.py:g", ["5"])


def test_lists_become_names_with_commas(file: Path) -> None:
    file.write_text('gpus = ["t4", "l4"]\ntarget = 8\n')
    assert parsed(["compare", "m.py:f", "--config", str(file)]).gpus == "t4,l4"


def test_a_table_is_for_its_command_and_tool_autobatch_for_all(file: Path) -> None:
    file.write_text(
        '[tool.other]\nx = 1\n[tool.autobatch]\ngpu = "t4"\n'
        "[tool.autobatch.probe]\ntarget = 8\n[tool.autobatch.predict]\nmicro-batch = 4\n"
    )
    probe = parsed(["probe", "m.py:f", "--config", str(file)])
    assert (probe.gpu, probe.target) == ("t4", 8)
    predict = parsed(["predict", "m.py:f", "--config", str(file)])
    assert (predict.gpu, predict.micro_batch) == ("t4", 4)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("targt = 8", "sets 'targt', which is no option of `autobatch probe` (did you mean target"),
        ("help = true", "sets 'help'"),
        ("config = 'x'", "sets 'config'"),
        ("prove = 3", "sets prove = 3: use true or false"),
        ("target = 1979-05-27", "use a number, a text, or a list of them"),
        ("headroom = true", "sets headroom = true: use a number, a text, or a list of them"),
        ("headroom = [1, false]", "sets headroom = [1, false]: use a number"),
        ("target = [", "is no TOML file"),
        ("x = " + 9999 * "[", "is no TOML file"),
        ("tool = 3", "sets tool = 3, which is no table: write options below [tool.autobatch]"),
        ("[tool]\nautobatch = 'x'", 'sets tool.autobatch = "x", which is no table'),
        ("[prob]\ntarget = 8", "a table [prob], which is no command (did you mean probe"),
        ("target = 'many'", "sets target = \"many\": invalid int value: 'many'"),
        ("headroom = 'much'", 'run.toml\' sets headroom = "much": '),
        ("time-limit = 'long'", 'run.toml\' sets time-limit = "long": '),
        ("optimizer = 'adamww'", 'run.toml\' sets optimizer = "adamww" (did you mean adamw'),
        ("precision = 8", "run.toml' sets precision = 8: use fp32, tf32, "),
    ],
)
def test_what_a_file_cannot_say_is_one_line(
    text: str, words: str, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_text(text)
    assert main(["probe", "m.py:f", "--config", str(file)]) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1


def test_a_file_that_is_missing_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["probe", "m.py:f", "--config", "none.toml"]) == 2
    assert "cannot read the file 'none.toml'" in capsys.readouterr().err


def test_the_command_that_is_kept_is_what_was_typed(
    file: Path, calls: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_text('target = 256\ngpu = "a100-40gb"\n')
    words = ["probe", "m.py:f", "--no-isolate", "--no-cache", "--json", "-", "--config", str(file)]
    assert main(words) == 0
    assert f'"command": "autobatch {" ".join(words)}"' in capsys.readouterr().out
