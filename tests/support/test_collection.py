"""Garbage is looked for again after a pause, unless the caller had switched that off."""

from __future__ import annotations

import gc

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
