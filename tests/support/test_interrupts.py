from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

import pytest

from autobatch.support import interrupts
from autobatch.support.interrupts import (
    arriving,
    held,
    interrupted_by_sigterm,
    is_terminated,
    let_through,
    uninterrupted,
)


@pytest.fixture(autouse=True)
def handler_as_before() -> Iterator[None]:
    before = signal.getsignal(signal.SIGINT)
    yield
    assert signal.getsignal(signal.SIGINT) is before
    assert interrupts._watch is None


def press() -> None:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0)  # where Python calls the handler


def test_an_interrupt_waits_until_code_lets_it_through() -> None:
    reached = []

    def work() -> None:
        with held():
            press()
            reached.append("between operators")
            let_through()
            reached.append("too late")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert reached == ["between operators"]


def test_an_interrupt_that_nothing_lets_through_comes_at_the_end() -> None:
    reached = []

    def work() -> None:
        with held():
            press()
            reached.append("all")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert reached == ["all"]


def test_without_an_interrupt_nothing_happens() -> None:
    with held():
        let_through()
    let_through()


def test_an_interrupt_that_was_swallowed_is_raised_at_the_end() -> None:
    swallowed = []

    def work() -> None:
        with arriving():
            try:
                press()
            except KeyboardInterrupt:
                swallowed.append(True)

    with pytest.raises(KeyboardInterrupt):
        work()
    assert swallowed == [True]


def test_an_interrupt_that_was_swallowed_is_raised_again_after_many_operators() -> None:
    calls = 0

    def work() -> None:
        nonlocal calls
        with held():
            press()
            with contextlib.suppress(KeyboardInterrupt):
                let_through()
            while calls < 100_000:  # a process that ignores interrupts has none raised
                calls += 1
                let_through()

    with pytest.raises(KeyboardInterrupt):
        work()
    assert 100 < calls < 10_000


def test_an_error_that_an_interrupt_became_is_an_interrupt_again() -> None:
    def work() -> None:
        with held():
            press()
            try:
                let_through()
            except KeyboardInterrupt:
                raise RuntimeError("KeyboardInterrupt: <no detail>") from None

    with pytest.raises(KeyboardInterrupt):
        work()


def test_an_error_without_an_interrupt_stays() -> None:
    with pytest.raises(ZeroDivisionError), held():
        _ = 1 / 0


def test_a_second_interrupt_comes_at_once() -> None:
    def work() -> None:
        with held():
            press()
            press()
            raise AssertionError("the second one was held back too")

    with pytest.raises(KeyboardInterrupt):
        work()


def test_code_without_operators_is_interrupted_after_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(interrupts, "_PATIENCE_S", 0.1)
    started = time.monotonic()

    def work() -> None:
        with held():
            press()
            time.sleep(20)

    with pytest.raises(KeyboardInterrupt):
        work()
    assert time.monotonic() - started < 10


def test_a_handler_that_does_not_raise_lets_the_block_go_on() -> None:
    heard = []

    def note(number: int, frame: FrameType | None) -> None:
        heard.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        with held():
            press()
            assert heard == []
            let_through()
            assert heard == [signal.SIGINT]
            let_through()
        assert heard == [signal.SIGINT]
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_part_that_must_be_whole_is_so_inside_too() -> None:
    done = []

    def work() -> None:
        with arriving():
            with uninterrupted():
                press()
                done.append("whole")
            done.append("after it")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == ["whole"]


def test_other_threads_are_left_alone() -> None:
    reached = []

    def run() -> None:
        with held():
            let_through()
            reached.append(signal.getsignal(signal.SIGINT))

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert reached == [before]


@pytest.fixture
def ours() -> Iterator[None]:
    """Let a SIGTERM have its default, and forget one that came."""
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGTERM, before)
    interrupts._terminated = False


def test_sigterm_interrupts_once(ours: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupts, "_end_late", lambda: None)
    assert not is_terminated()
    with pytest.raises(KeyboardInterrupt), interrupted_by_sigterm():
        signal.raise_signal(signal.SIGTERM)
    assert is_terminated()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_sigterm_is_held_back_where_ctrl_c_is(ours: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupts, "_end_late", lambda: None)
    done = []

    def work() -> None:
        with interrupted_by_sigterm(), held():
            signal.raise_signal(signal.SIGTERM)
            done.append(True)
            let_through()
            done.append(False)

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == [True]


def test_a_sigterm_that_is_ignored_stays_so(ours: None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with interrupted_by_sigterm():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    assert not is_terminated()


def test_a_process_that_takes_long_to_clean_up_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    monkeypatch.setattr(interrupts, "_CLEANING_S", 0.0)
    monkeypatch.setattr(interrupts.os, "_exit", ended.append)
    interrupts._end_late()
    assert ended == [143]
