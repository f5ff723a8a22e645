from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autobatch.gpus.budget import (
    DeviceReading,
    OutsideMemory,
    budget_bytes,
    device_notes,
    growth_bytes,
    outside_memory,
    spilled_bytes,
    usable_bytes,
)
from autobatch.support.units import GIB, MIB

TYPICAL = 500 * MIB
sizes = st.integers(0, 200 * GIB)
headrooms = st.floats(0, 1, exclude_max=True)


@st.composite
def readings(draw: st.DrawFn, known: bool | None = None) -> DeviceReading:
    context, others, reserved, free = (draw(sizes) for _ in range(4))
    known = draw(st.booleans()) if known is None else known
    return DeviceReading(
        capacity_bytes=context + others + reserved + free,
        free_bytes=free,
        reserved_bytes=reserved,
        allowed_bytes=draw(st.none() | sizes),
        own_bytes=context + reserved if known else None,
    )


def card(
    *, context: int = 600 * MIB, others: int = 0, reserved: int = 10 * GIB, known: bool = True
) -> DeviceReading:
    """A card of 80 GiB."""
    return DeviceReading(
        capacity_bytes=80 * GIB,
        free_bytes=80 * GIB - context - others - reserved,
        reserved_bytes=reserved,
        own_bytes=context + reserved if known else None,
    )


def said(first: DeviceReading, last: DeviceReading, *, spilled: int = 0) -> list[str]:
    lines = list(device_notes(first, last, typical_context_bytes=TYPICAL, spilled=spilled))
    assert not any("\n" in line for line in lines)
    return lines


@given(readings(), sizes)
def test_context_others_reserved_and_free_are_the_capacity(
    reading: DeviceReading, typical: int
) -> None:
    held = outside_memory(reading, typical_context_bytes=typical)
    parts = (held.context_bytes, held.others_bytes, reading.reserved_bytes, reading.free_bytes)
    assert min(parts) >= 0
    assert sum(parts) == reading.capacity_bytes
    assert held.split_known == (reading.own_bytes is not None)


@given(readings(known=True), sizes)
def test_the_drivers_figure_gives_the_context_whatever_is_typical(
    reading: DeviceReading, typical: int
) -> None:
    held = outside_memory(reading, typical_context_bytes=typical)
    assert held.context_bytes + reading.reserved_bytes == reading.own_bytes


@given(readings(known=False), sizes)
def test_without_the_drivers_figure_the_context_is_typical_but_no_more_than_the_sum(
    reading: DeviceReading, typical: int
) -> None:
    held = outside_memory(reading, typical_context_bytes=typical)
    assert held.context_bytes == min(typical, held.outside_bytes)


@given(readings(), st.integers(0, 10**12), sizes)
def test_nothing_is_negative_even_where_figures_contradict_each_other(
    reading: DeviceReading, own: int, reserved: int
) -> None:
    odd = replace(reading, own_bytes=own, reserved_bytes=reserved)
    held = outside_memory(odd, typical_context_bytes=TYPICAL)
    assert min(held.context_bytes, held.others_bytes, usable_bytes(odd, held)) >= 0


def test_a_figure_below_what_is_reserved_is_another_process_with_this_id() -> None:
    stranger = replace(card(), own_bytes=5 * GIB)
    assert not outside_memory(stranger, typical_context_bytes=TYPICAL).split_known


@given(readings(), headrooms)
def test_budget_is_at_most_usable_is_at_most_what_is_allowed_and_the_capacity(
    reading: DeviceReading, headroom: float
) -> None:
    usable = usable_bytes(reading, outside_memory(reading, typical_context_bytes=TYPICAL))
    assert 0 <= budget_bytes(usable, headroom) <= usable <= reading.capacity_bytes
    assert budget_bytes(usable, 0.0) == usable
    if reading.allowed_bytes is None:
        assert usable == reading.free_bytes + reading.reserved_bytes
    else:
        assert usable <= reading.allowed_bytes


@given(readings(), sizes, sizes, headrooms)
def test_more_in_other_hands_never_leaves_more(
    reading: DeviceReading, context: int, more: int, headroom: float
) -> None:
    usable = [
        usable_bytes(
            reading, OutsideMemory(context_bytes=context, others_bytes=others, split_known=True)
        )
        for others in (0, more)
    ]
    assert usable[0] >= usable[1]
    assert budget_bytes(usable[0], headroom) >= budget_bytes(usable[1], headroom)


@given(st.lists(readings(), min_size=1, max_size=4), readings())
def test_no_further_look_at_the_card_makes_more_of_it_usable_than_that_look_shows(
    seen: list[DeviceReading], last: DeviceReading
) -> None:
    held = outside_memory(*seen, last, typical_context_bytes=TYPICAL)
    assert held.outside_bytes >= last.outside_bytes
    assert usable_bytes(last, held) <= last.free_bytes + last.reserved_bytes


def test_the_largest_context_and_the_largest_others_count() -> None:
    cold = card(context=400 * MIB, others=2 * GIB)
    warm = card(context=700 * MIB, others=1 * GIB)
    assert outside_memory(cold, warm, typical_context_bytes=TYPICAL) == OutsideMemory(
        context_bytes=700 * MIB, others_bytes=2 * GIB, split_known=True
    )


def test_one_reading_with_the_drivers_figure_divides_the_others() -> None:
    blind = card(others=GIB, known=False)
    assert outside_memory(blind, card(others=GIB), typical_context_bytes=TYPICAL) == OutsideMemory(
        context_bytes=600 * MIB, others_bytes=GIB, split_known=True
    )


def test_a_context_that_loads_kernels_is_growth_only_where_it_cannot_be_told_apart() -> None:
    for known, growth in ((True, 0), (False, 300 * MIB)):
        first, last = (
            outside_memory(card(context=context, known=known), typical_context_bytes=TYPICAL)
            for context in (400 * MIB, 700 * MIB)
        )
        assert growth_bytes(first, last) == growth
        assert growth_bytes(last, first) == 0


@given(readings(), sizes)
def test_what_fits_on_the_card_has_not_spilled(reading: DeviceReading, peak: int) -> None:
    spilled = spilled_bytes(reading, peak)
    assert spilled >= 0
    if peak <= reading.free_bytes + reading.reserved_bytes:
        assert spilled == 0


def test_reserved_beyond_the_card_lies_in_the_hosts_memory() -> None:
    windows = card(context=GIB, known=False)
    assert spilled_bytes(windows, 80 * GIB) == GIB
    linux = card(context=GIB, known=True)
    assert spilled_bytes(linux, 80 * GIB) == 0


def test_a_spill_does_not_make_the_card_look_emptier() -> None:
    before = card(context=GIB, known=False)
    after = replace(before, free_bytes=0, reserved_bytes=90 * GIB)
    held = outside_memory(before, after, typical_context_bytes=TYPICAL)
    assert held.outside_bytes == GIB


def test_a_card_of_ones_own_is_worth_no_sentence() -> None:
    assert said(card(context=400 * MIB), card(context=700 * MIB, reserved=60 * GIB)) == []


def test_other_processes_are_named_with_what_they_hold() -> None:
    (line,) = said(card(others=3 * GIB), card(others=3 * GIB))
    assert line.startswith("other processes hold 3.00 GiB of 80.0 GiB")


def test_a_parent_that_holds_most_of_what_others_hold_is_named() -> None:
    reading = replace(card(others=3 * GIB), parent_bytes=3 * GIB - 5 * MIB)
    (line,) = said(reading, reading)
    assert line.startswith("the process that asked holds 3.00 GiB of 80.0 GiB itself")
    assert "without isolate=True" in line


def test_growth_of_others_above_64_mib_is_named() -> None:
    def growing(by: int) -> list[str]:
        lines = said(card(others=GIB), card(others=GIB + by))
        return [line for line in lines if "grew" in line]

    assert growing(64 * MIB) == []
    (line,) = growing(65 * MIB)
    assert line.startswith("other processes grew by 65.0 MiB during the probe")


def test_a_hidden_split_is_named_an_assumption_and_kernels_are_no_growth() -> None:
    (line,) = said(card(context=300 * MIB, known=False), card(context=612 * MIB, known=False))
    assert "612 MiB outside its allocator" in line
    assert "500 MiB are assumed to be its CUDA context and 112 MiB other processes" in line


def test_a_hidden_split_does_not_hide_another_process_that_starts() -> None:
    lines = said(card(known=False), card(others=5 * GIB, known=False))
    assert any("other processes, it seems, grew by 5.00 GiB" in line for line in lines)


def test_a_spill_is_named() -> None:
    (line,) = said(card(), card(), spilled=2 * GIB)
    assert line.startswith("the driver moved 2.00 GiB beyond the card's 80.0 GiB")


@pytest.mark.parametrize(("allowed", "binding"), [(40 * GIB, True), (80 * GIB, False)])
def test_a_fraction_is_named_where_it_is_what_limits(allowed: int, binding: bool) -> None:
    lines = said(card(), replace(card(), allowed_bytes=allowed))
    assert [line.split(":")[0] for line in lines] == (
        ["torch.cuda.set_per_process_memory_fraction limits this process to 40.0 GiB of 80.0 GiB"]
        if binding
        else []
    )
