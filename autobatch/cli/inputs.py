"""What a batch is, as a command says it: shapes of one sample, or a sample of the user's.

Invariant: reading what was typed imports no torch; batches are made where the model runs.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autobatch.errors import FileError, UsageError, WorkloadError
from autobatch.support.wording import near, said_by

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Input", "InputBatches", "fingerprint", "inputs_of", "loaded_sample"]

_DTYPES = "float32 float16 bfloat16 float64 int64 int32 int16 int8 uint8 bool".split()

_FORM = re.compile(
    r"(?:(?P<name>[A-Za-z_]\w*)=)?(?P<dtype>[A-Za-z]\w*)?:?(?P<shape>(?:\d+(?:x\d+)*)?)", re.ASCII
)

_SHAPES = "write sizes such as 3x224x224, int64:128 for tokens, or int64 for one label"


@dataclass(frozen=True, slots=True)
class Input:
    """One tensor of a batch, without its batch dimension.

    Attributes:
        shape: of one sample.
        dtype: its name in PyTorch.
        name: the keyword that it is passed as; empty for a plain argument.
    """

    shape: tuple[int, ...]
    dtype: str
    name: str = ""

    def __str__(self) -> str:
        """Write the input as it can be typed.

        >>> str(Input((128,), "int64", "input_ids"))
        'input_ids=int64:128'
        """
        sizes = "x".join(map(str, self.shape))
        return f"{f'{self.name}=' if self.name else ''}{self.dtype}{f':{sizes}' if sizes else ''}"


def inputs_of(texts: Sequence[str]) -> tuple[Input, ...]:
    """Return the inputs that `--input-shape` names, in their order.

    Raises:
        UsageError: one is not written [NAME=][DTYPE:]SIZES, or some have names and others not.

    >>> [str(one) for one in inputs_of(["3x224x224,int64"])]
    ['float32:3x224x224', 'int64']
    """
    parts = [part.strip() for text in texts for part in text.split(",")]
    inputs = tuple(_input_of(part) for part in parts)
    named = [one.name for one in inputs if one.name]
    if named and len(set(named)) < len(inputs):
        raise UsageError(
            f"--input-shape is {','.join(parts)!r}: give every input a name of its own, or none"
        )
    return inputs


def _input_of(text: str) -> Input:
    found = _FORM.fullmatch(text)
    shape, dtype = (found["shape"], found["dtype"]) if found else ("", None)
    if not found or not (shape or dtype) or (shape and dtype and ":" not in text):
        raise UsageError(f"--input-shape is {text!r}: {_SHAPES}")
    dtype = dtype or "float32"
    if dtype not in _DTYPES:
        raise UsageError(
            f"--input-shape is {text!r}: there is no dtype {dtype!r}{near(dtype, _DTYPES)}; "
            f"{_SHAPES}"
        )
    sizes = tuple(int(size) for size in shape.split("x")) if shape else ()
    if 0 in sizes:
        raise UsageError(f"--input-shape is {text!r}: every size is at least 1")
    return Input(sizes, dtype, found["name"] or "")


@dataclass(frozen=True, slots=True)
class InputBatches:
    """Makes batches of inputs that were described: random floats, and whole numbers 0 and 1.

    Attributes:
        inputs: the tensors of a batch; named ones come as a dict, several as a tuple.
    """

    inputs: tuple[Input, ...]

    def __call__(self, n: int) -> Any:
        """Return a batch of n samples."""
        made = [_tensor(one, n) for one in self.inputs]
        if self.inputs[0].name:
            return {one.name: tensor for one, tensor in zip(self.inputs, made, strict=True)}
        return made[0] if len(made) == 1 else tuple(made)


def _tensor(one: Input, n: int) -> Tensor:
    import torch

    dtype = getattr(torch, one.dtype)
    size = (n, *one.shape)
    if dtype.is_floating_point:
        return torch.randn(size).to(dtype)
    return torch.randint(2, size).to(dtype)  # valid as a class, and as an index


def loaded_sample(named: str) -> Any:
    """Return the batch, Dataset or DataLoader that `--sample` names.

    Raises:
        FileError: the file holds no tensors, or cannot be read.
        SpecError: there is no such file or function.
        WorkloadError: the user's code raised; the original error is chained.
    """
    if _is_saved(named):
        return _load(named)
    from torch.utils.data import DataLoader, Dataset

    from autobatch.workload.spec.user_code import named_object

    found = named_object(named)
    if isinstance(found, (Dataset, DataLoader)) or not callable(found):
        return found
    try:
        return found()
    except (Exception, SystemExit) as error:
        raise WorkloadError(f"{named} raised {said_by(error)}") from error


def fingerprint(named: str | None) -> str | None:
    """Return what tells a file of tensors from another one at the same place; None of other code.

    Raises:
        FileError: the file cannot be read.
    """
    if named is None or not _is_saved(named):
        return None
    import hashlib

    try:
        return hashlib.sha256(Path(named).read_bytes()).hexdigest()
    except OSError as error:
        raise FileError(f"cannot read the sample {named!r}: {error.strerror}") from error


def _is_saved(named: str) -> bool:
    """Whether a sample is a file of tensors; a function is named after the last colon."""
    return named.endswith((".pt", ".pth")) or ":" not in named


def _load(file: str) -> Any:
    import torch

    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise FileError(f"cannot read the sample {file!r}: {error.strerror}") from error
    except Exception as error:
        raise FileError(
            f"the sample {file!r} is no file of tensors: write a batch with torch.save(batch, "
            "file), as tensors in tuples, lists and dicts, or name file.py:function"
        ) from error
