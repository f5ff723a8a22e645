import gc
import weakref
from types import FunctionType

import pytest
import torch

from autobatch.support.oom import LEGACY, Shortage, attempt, let_go, shortage_in

MESSAGE = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.19 GiB "
    "of which 1.00 GiB is free."
)


def failing(error):
    def work():
        raise error

    return work


def test_the_type_is_known_whatever_it_says():
    assert attempt(failing(torch.OutOfMemoryError("no room"))) == Shortage("no room")


def test_a_shortage_names_the_request_and_not_the_whole_state_of_the_card():
    found = attempt(failing(torch.OutOfMemoryError(MESSAGE)))
    assert found == "CUDA out of memory. Tried to allocate 2.00 GiB"


@pytest.mark.parametrize("message", LEGACY)
def test_what_libraries_say_in_a_runtime_error_is_known(message):
    assert isinstance(attempt(failing(RuntimeError(f"{message} when calling f()"))), Shortage)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        ValueError("CUDA out of memory"),
        MemoryError(),
    ],
)
def test_other_errors_go_on(error):
    with pytest.raises(type(error)):
        attempt(failing(error))


def test_an_oom_that_somebody_wrapped_is_found():
    def wrapped():
        try:
            raise torch.OutOfMemoryError(MESSAGE)
        except RuntimeError as error:
            raise ValueError("the step failed") from error

    def while_pytorch_cleans_up():
        def clean_up():
            try:
                raise torch.OutOfMemoryError(MESSAGE)
            except RuntimeError:
                raise RuntimeError("the graph is gone")  # noqa: B904

        FunctionType(clean_up.__code__, {**globals(), "__name__": "torch.autograd.graph"})()

    assert isinstance(attempt(wrapped), Shortage)
    assert isinstance(attempt(while_pytorch_cleans_up), Shortage)


@pytest.mark.parametrize("kind", [KeyError, RuntimeError])
def test_an_error_in_code_that_handles_an_oom_itself_is_that_error(kind):
    def falls_back():
        try:
            raise torch.OutOfMemoryError(MESSAGE)
        except RuntimeError:
            raise kind("the slow way has a mistake")  # noqa: B904

    with pytest.raises(kind, match="the slow way"):
        attempt(falls_back)


def test_a_circle_of_causes_ends():
    first, second = ValueError(1), ValueError(2)
    first.__cause__, second.__cause__ = second, first
    assert shortage_in(first) is None


def test_nothing_of_the_failed_work_is_alive_afterwards():
    class Big:
        pass

    seen = []

    def work():
        held = Big()
        seen.append(weakref.ref(held))
        inner(held)

    def inner(held):
        kept = [held]
        raise torch.OutOfMemoryError(f"{MESSAGE} {len(kept)}")

    gc.disable()
    try:
        assert isinstance(attempt(work), Shortage)
        assert seen[0]() is None  # without any collection
    finally:
        gc.enable()


def test_an_error_that_is_let_go_holds_nothing_that_lacks_an_attribute():
    class Big:
        pass

    try:
        Big().size  # noqa: B018
    except AttributeError as error:
        let_go(error)
        assert error.obj is None


def test_results_come_through():
    assert attempt(lambda: 42) == 42
