"""The digest of an object: equal for equal things in any process, another for any other."""

from __future__ import annotations

import enum
import functools
import logging
import re
import threading
import types

import numpy
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from autobatch.tuning import fingerprint
from autobatch.tuning.fingerprint import UndescribableError, digest, surroundings


@settings(max_examples=60, deadline=None)
@given(
    st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.binary()),
        lambda inner: st.one_of(
            st.lists(inner), st.tuples(inner, inner), st.dictionaries(st.text(), inner)
        ),
        max_leaves=6,
    ).flatmap(lambda value: st.tuples(st.just(value), st.one_of(st.just(value), st.text())))
)
def test_two_values_share_a_hash_only_if_they_are_written_alike(pair):
    first, second = pair
    assert (digest(first) == digest(second)) == (repr(first) == repr(second))


def test_cycles_end_and_shared_objects_are_no_copies():
    def cycle():
        inner: list[object] = []
        inner.append({"again": inner})
        return inner

    shared: list[int] = []
    assert digest(cycle()) == digest(cycle())
    assert digest([shared, shared]) != digest([[], []])


def test_depth_is_no_limit():
    deep: list[object] = []
    for _ in range(10_000):
        deep = [deep]
    assert digest(deep) == digest([*deep])


class Scale:
    """State that a class leaves out of its pickled form counts all the same."""

    def __init__(self, factor):
        self.factor = factor

    def __getstate__(self):
        return {}


class Reduced(Scale):
    def __reduce__(self):
        return (Reduced, (1,))


class Slotted:
    __slots__ = ("a", "b")

    def __init__(self, a):
        self.a = a


class Level(enum.IntFlag):
    LOW = 1
    HIGH = 2


def double(x):
    return 2 * x


def triple(x):
    return 3 * x


def bound(function):
    linear = nn.Linear(2, 2)
    linear.forward = types.MethodType(function, linear)
    return linear


def with_own_hooks(name):
    linear = nn.Linear(2, 2)
    linear._my_hooks = {name: double}
    return linear


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (lambda: Scale(1), lambda: Scale(2)),
        (lambda: Reduced(1), lambda: Reduced(2)),
        (lambda: Slotted(1), lambda: Slotted(2)),
        (lambda: Level.LOW, lambda: Level.LOW | Level.HIGH),
        (lambda: bound(double), lambda: bound(triple)),
        (lambda: functools.cache(double), lambda: functools.cache(triple)),
        (lambda: property(double), lambda: property(triple)),
        (lambda: {"a", "b"}, lambda: {"a", "c"}),
        (lambda: {torch.half}, lambda: {torch.float}),
        (lambda: numpy.arange(4)[::2], lambda: numpy.arange(4)[1::2]),
        (lambda: re.compile("a"), lambda: re.compile("b")),
        (lambda: list[int], lambda: list[str]),
        (lambda: logging.getLogger("a"), lambda: logging.getLogger("b")),
        (lambda: F.gelu, lambda: F.relu),
        (lambda: torch.ops.aten.mm.default, lambda: torch.ops.aten.add.Tensor),
        (lambda: torch.zeros(4)[:2], lambda: torch.zeros(4)[2:]),
        (lambda: with_own_hooks("a"), lambda: with_own_hooks("b")),
        (
            lambda: nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)),
            lambda: nn.utils.parametrizations.weight_norm(nn.Linear(2, 2), dim=1),
        ),
    ],
)
def test_different_objects_have_different_digests_and_equal_ones_the_same(first, second):
    assert digest(first()) == digest(first()) != digest(second()) == digest(second())


@pytest.mark.parametrize(
    "value",
    [
        threading.Lock(),
        threading.local(),
        (x for x in "ab"),
        {object()},
        {torch.zeros(1)},
        torch.zeros(2, 2).to_sparse(),
        nn.LazyLinear(3),
        numpy.zeros(2**22),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_has_no_parts_to_show_is_an_error(value):
    with pytest.raises((UndescribableError, TypeError, ValueError, NotImplementedError)):
        digest(value)


def test_random_states_do_not_count():
    first, second = (torch.Generator().manual_seed(seed) for seed in (1, 2))
    assert digest(first) == digest(second)


def test_a_patch_that_takes_the_name_of_the_original_counts(monkeypatch):
    def loss(x):
        return F.mse_loss(x, x)

    before = digest(loss)
    original = F.mse_loss

    @functools.wraps(original)
    def patched(*args):
        return original(*args) * 2

    monkeypatch.setattr(F, "mse_loss", patched)
    assert digest(loss) != before


def test_an_endless_description_is_given_up(monkeypatch):
    monkeypatch.setattr(fingerprint, "MOST_BYTES", 1000)
    with pytest.raises(UndescribableError, match="too much"):
        digest(list(range(1000)))


def test_a_switch_that_this_torch_does_not_have_is_unknown():
    switches = surroundings()["switches"]
    assert isinstance(switches, dict) and switches["version.cuda"] == torch.version.cuda
    assert fingerprint._switch("backends.no_such_thing") == "unknown"


def test_the_users_files_are_among_the_surroundings_and_libraries_are_not():
    sources = surroundings()["sources"]
    assert isinstance(sources, dict) and __name__ in sources
    assert not sources.keys() & {"torch", "numpy", "itertools", "autobatch.tuning.cache"}
