from __future__ import annotations

from pathlib import Path

import pytest
import torch

from autobatch.cli.inputs import InputBatches, fingerprint, inputs_of, loaded_sample
from autobatch.errors import FileError, SpecError, UsageError, WorkloadError


def test_shapes_are_those_of_one_sample() -> None:
    images, labels = InputBatches(inputs_of(["3x8x8", "int64"]))(5)
    assert (images.shape, images.dtype) == ((5, 3, 8, 8), torch.float32)
    assert (labels.shape, labels.dtype) == ((5,), torch.int64)
    assert set(labels.tolist()) <= {0, 1}


def test_one_input_is_a_tensor_and_named_ones_are_keywords() -> None:
    assert InputBatches(inputs_of(["bfloat16:7"]))(2).dtype == torch.bfloat16
    batch = InputBatches(inputs_of(["input_ids=int64:16,mask=bool:16"]))(2)
    assert {name: (x.dtype, tuple(x.shape)) for name, x in batch.items()} == {
        "input_ids": (torch.int64, (2, 16)),
        "mask": (torch.bool, (2, 16)),
    }


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "write sizes such as"),
        ("3x", "write sizes such as"),
        ("3X224", "write sizes such as"),
        ("3x0", "every size is at least 1"),
        ("-1x3", "write sizes such as"),
        ("int46:3", "no dtype 'int46' (did you mean int64"),
        ("int6:3", "no dtype 'int6'"),
        ("a=3,4", "give every input a name of its own, or none"),
        ("a=3,a=4", "give every input a name of its own, or none"),
        ("3,,4", "write sizes such as"),
        ("int64128", "no dtype"),
    ],
)
def test_a_shape_that_cannot_be_read_is_refused_by_name(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=r"^--input-shape is ") as caught:
        inputs_of([text])
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_sample_is_read_from_a_file_of_tensors(tmp_path: Path) -> None:
    file = tmp_path / "batch.pt"
    torch.save({"x": torch.ones(2, 3)}, file)
    assert torch.equal(loaded_sample(str(file))["x"], torch.ones(2, 3))
    before = fingerprint(str(file))
    torch.save({"x": torch.zeros(2, 3)}, file)
    assert fingerprint(str(file)) != before
    assert fingerprint("m.py:f") is None and fingerprint(None) is None


def test_a_sample_is_what_a_function_returns_or_a_variable_holds(tmp_path: Path) -> None:
    file = tmp_path / "m.py"
    file.write_text(
        "import torch\ndef batch():\n    return torch.ones(2, 3)\nkept = (torch.ones(1),)\n"
        "def fails():\n    raise KeyError('k')\n"
    )
    assert loaded_sample(f"{file}:batch").shape == (2, 3)
    assert len(loaded_sample(f"{file}:kept")) == 1
    with pytest.raises(WorkloadError, match="raised KeyError"):
        loaded_sample(f"{file}:fails")
    with pytest.raises(SpecError, match=r"has no function 'bach' .did you mean batch"):
        loaded_sample(f"{file}:bach")


class Thing:
    pass


def test_a_sample_that_holds_code_or_no_tensors_is_refused(tmp_path: Path) -> None:
    torch.save(Thing(), tmp_path / "thing.pt")
    (tmp_path / "text.pt").write_text("text")
    for file in ("thing.pt", "text.pt"):
        with pytest.raises(FileError, match="is no file of tensors"):
            loaded_sample(str(tmp_path / file))
    with pytest.raises(FileError, match="cannot read the sample"):
        loaded_sample(str(tmp_path / "none.pt"))
    with pytest.raises(FileError, match="cannot read the sample"):
        fingerprint("none.pt")
