"""Garbage is looked for again after a pause, unless the caller had switched that off."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest

from autobatch.support.collection import collection_paused


def test_a_pause_ends_with_its_block_and_with_an_error():
    assert gc.isenabled()
    with collection_paused():
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(ValueError, match="inside"), collection_paused():
        raise ValueError("inside")
    assert gc.isenabled()


def test_a_pause_leaves_collection_off_where_it_was_off():
    gc.disable()
    try:
        with collection_paused():
            assert not gc.isenabled()
        assert not gc.isenabled()
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("end", "said"), [("", ["handler", "collected"]), ("quick_exit()", ["handler"])]
)
def test_a_process_that_ends_quickly_runs_its_handlers_and_collects_no_garbage(end, said):
    code = f"""
import atexit
from autobatch.support.collection import quick_exit

class Cycle:
    def __init__(self):
        self.itself = self
        self.says = print
    def __del__(self):
        self.says("collected", flush=True)

atexit.register(print, "handler", flush=True)
kept = [Cycle()]
{end}
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert ended.stdout.split() == said


def test_a_process_that_ends_quickly_writes_what_garbage_holds(tmp_path):
    path = tmp_path / "log.txt"
    code = f"""
from autobatch.support.collection import quick_exit

class Log:
    def __init__(self):
        self.itself = self
        self.file = open({str(path)!r}, "w")
        self.file.write("written")

kept = Log()
quick_exit()
"""
    subprocess.run([sys.executable, "-c", code], check=True)

    assert path.read_text() == "written"
