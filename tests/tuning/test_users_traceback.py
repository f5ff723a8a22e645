from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

from autobatch.records.codec import decode, encode
from autobatch.tuning.isolation import RemoteTraceback
from autobatch.tuning.users_traceback import UsersTraceback, users_traceback


class Net(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(7, 3)


def of_call_of(model: nn.Module) -> UsersTraceback:
    with pytest.raises(RuntimeError) as caught:
        model(torch.ones(2))
    return users_traceback(caught.value)


def test_frames_of_pytorch_are_left_out() -> None:
    found = of_call_of(nn.Sequential(Net()))
    assert [line[2] for line in found.lines] == ["of_call_of", "forward"]
    assert found.where.startswith("tests/tuning/test_users_traceback.py:")
    assert found.where.endswith(" in forward")
    assert decode(UsersTraceback, encode(found)) == found
    assert pickle.loads(pickle.dumps(RemoteTraceback("text", found))).users == found


def test_what_the_message_says_is_not_said_again() -> None:
    found = UsersTraceback(error="KeyError: two\nlines\n")
    assert found.shown("the model failed: KeyError: two lines") == ""
    assert found.shown("the model failed") == "KeyError: two\nlines\n"


def test_of_many_calls_the_innermost_are_shown() -> None:
    lines = tuple((f"{number}.py", number, "f", "") for number in range(20))
    shown = UsersTraceback(lines=lines).shown("").splitlines()
    assert shown[0] == "  [8 calls above are left out]"
    assert (len(shown), shown[-1]) == (13, '  File "19.py", line 19, in f')


def test_an_error_in_a_package_is_placed_there(tmp_path: Path) -> None:
    file = tmp_path / "lib" / "site-packages" / "models" / "net.py"
    with pytest.raises(ZeroDivisionError) as caught:
        exec(compile("1 / 0", str(file), "exec"))
    caught.value.__traceback__ = caught.tb.tb_next
    assert users_traceback(caught.value).where == "models/net.py:1"


def test_the_line_is_that_of_the_cause_where_the_error_has_none() -> None:
    error = RuntimeError("again")
    with pytest.raises(KeyError) as caught:
        {}["a"]
    error.__cause__ = caught.value
    assert users_traceback(error).where.endswith(
        " in test_the_line_is_that_of_the_cause_where_the_error_has_none"
    )
