"""An estimate is what limits each kernel, put together as windows run."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autobatch.gpus.catalogue import CATALOGUE, GpuSpec, find_gpu
from autobatch.gpus.links import links_of
from autobatch.gpus.roofline import EFFICIENCY, can_estimate, estimate
from autobatch.gpus.work import Communication, LinearWork, OpWork, WindowWork, Work

A100 = find_gpu("a100-80gb")
NOTHING = Work()


def product(n, precision="bf16"):
    return OpWork(
        op="mm",
        kind="matmul",
        precision=precision,
        flops=2.0 * n**3,
        bytes=6.0 * n * n,
        product=(1.0, n, n, n),
    )


def elementwise(size_bytes):
    return OpWork(op="add", kind="elementwise", precision="bf16", flops=0.0, bytes=size_bytes)


def window(*ops, backward=NOTHING, update=NOTHING, **more):
    return WindowWork(samples=4, forward=Work.of(ops), backward=backward, update=update, **more)


def seconds(work, gpu=A100, steps=1, **more):
    return estimate(work, gpu, accumulation_steps=steps, **more).seconds


def test_a_large_product_takes_its_flops_at_the_peak_times_the_efficiency():
    n = 32768
    share = EFFICIENCY.of_compute("matmul", "ampere")
    found = estimate(window(product(n)), A100, accumulation_steps=1)
    assert found.bound == "compute"
    assert found.seconds == pytest.approx(2 * n**3 / (312e12 * share), rel=0.01)
    assert found.low < found.seconds < found.high


def test_an_elementwise_op_takes_its_bytes_at_the_bandwidth_times_the_efficiency():
    found = estimate(window(elementwise(1e9)), A100, accumulation_steps=1)
    expected = 1e9 / (A100.bandwidth_bytes_per_s * EFFICIENCY.memory["elementwise"])
    assert found.bound == "memory"
    assert found.seconds == pytest.approx(expected, rel=0.01)


def test_many_tiny_ops_take_what_the_host_needs_to_launch_them():
    found = estimate(window(*[elementwise(64.0)] * 1000), A100, accumulation_steps=1)
    assert found.bound == "launch"
    assert found.seconds == pytest.approx(1000 * EFFICIENCY.call_seconds)


def test_a_small_product_does_not_fill_the_card():
    small, large = product(256), product(8192)
    by_flop = [seconds(window(op)) / op.flops for op in (small, large)]
    assert by_flop[0] > 3 * by_flop[1]


def test_a_product_that_is_a_little_wider_than_a_tile_takes_two_tiles():
    def of(columns):
        rows = depth = 16384.0
        return OpWork(
            op="mm",
            kind="matmul",
            precision="bf16",
            flops=2 * rows * depth * columns,
            bytes=1.0,
            product=(1.0, rows, columns, depth),
        )

    assert seconds(window(of(129.0))) > 1.5 * seconds(window(of(128.0)))


def test_a_window_is_the_first_micro_batch_all_later_ones_and_one_update():
    work = window(
        product(4096),
        backward=Work.of([product(4096)] * 2),
        later_forward=Work.of([product(4096)]),
        later_backward=Work.of([product(4096)] * 2 + [elementwise(1e9)]),
        update=Work.of([elementwise(4e9)]),
    )
    one, two, three = (seconds(work, steps=steps) for steps in (1, 2, 3))
    alone = seconds(window(elementwise(1e9)))
    assert three - two == pytest.approx(two - one, rel=1e-6)
    update = seconds(window(elementwise(4e9)))
    assert two - one == pytest.approx(one - update + alone, rel=1e-3)


@given(st.sampled_from(sorted(CATALOGUE)), st.floats(1.1, 4.0))
def test_a_card_that_is_faster_in_all_never_takes_longer(name, factor):
    gpu = CATALOGUE[name]
    faster = replace(
        gpu,
        bandwidth_bytes_per_s=int(gpu.bandwidth_bytes_per_s * factor),
        flops={precision: flops * factor for precision, flops in gpu.flops.items()},
    )
    work = window(product(2048), elementwise(1e8), product(512, "fp32"))
    assert seconds(work, faster) <= seconds(work, gpu)


def test_cards_are_in_the_order_of_their_speed():
    work = window(product(8192, "fp16"), elementwise(1e9))
    names = ["h100-80gb", "a100-80gb", "v100-32gb", "t4"]
    taken = [seconds(work, find_gpu(name)) for name in names]
    assert taken == sorted(taken)


def test_a_card_without_a_precision_does_what_it_does_without_it():
    t4 = find_gpu("t4")
    assert seconds(window(product(4096, "bf16")), t4) == seconds(window(product(4096, "fp32")), t4)
    fast, slow = (seconds(window(product(4096, kind)), A100) for kind in ("tf32", "fp32"))
    assert slow > 4 * fast


@pytest.mark.parametrize("precision", ["fp64", "fp8", "other"])
def test_a_precision_without_a_figure_gives_no_estimate(precision):
    assert estimate(window(product(64, precision)), A100, accumulation_steps=1) is None


def test_a_card_without_figures_gives_no_estimate():
    for gpu in (GpuSpec(name="card", capacity_bytes=2**34), find_gpu("24GiB")):
        assert not can_estimate(gpu)
        assert estimate(window(elementwise(1e6)), gpu, accumulation_steps=1) is None


def test_every_card_of_the_catalogue_can_be_estimated():
    for gpu in CATALOGUE.values():
        assert can_estimate(gpu)
        assert seconds(window(product(1024, "fp32"), elementwise(1e6)), gpu) > 0


def test_only_what_tensor_cores_do_converts_layouts():
    conversion = replace(elementwise(1e9), kind="conversion", precision="tf32")
    assert seconds(window(conversion), A100) > 1e-4
    assert seconds(window(conversion), find_gpu("v100-16gb")) < 1e-4


def gathered(size_bytes, overlaps=True, collective="all_gather", ranks=8):
    return Communication(collective=collective, bytes=size_bytes, ranks=ranks, overlaps=overlaps)


def shared(*collectives, ops=()):
    return WindowWork(
        samples=4, forward=Work.of(ops, collectives), backward=NOTHING, update=NOTHING
    )


def test_a_collective_takes_what_a_ring_takes():
    found = estimate(shared(gathered(8e9)), A100, accumulation_steps=1, world_size=8)
    bandwidth = links_of(A100).gpu_bytes_per_s * EFFICIENCY.link
    expected = 7 / 8 * 8e9 / bandwidth + EFFICIENCY.collective_seconds
    assert found.seconds == pytest.approx(expected)
    assert found.bound == "communication"
    twice = shared(gathered(8e9, collective="all_reduce"))
    assert seconds(twice, world_size=8) == pytest.approx(2 * expected, rel=0.01)


def through_host(size_bytes, what, overlaps=False):
    return Communication(collective=what, bytes=size_bytes, ranks=1, overlaps=overlaps)


@pytest.mark.parametrize("what", ["to_host", "from_host"])
@pytest.mark.parametrize("gpu", ["t4", "a100-80gb", "h100-80gb", "gh200"])
def test_a_copy_takes_its_bytes_at_the_bandwidth_to_the_host(what, gpu):
    card = find_gpu(gpu)
    found = estimate(shared(through_host(8e9, what)), card, accumulation_steps=1)
    bandwidth = links_of(card).host_bytes_per_s * EFFICIENCY.link
    assert found.seconds == pytest.approx(8e9 / bandwidth + EFFICIENCY.call_seconds)
    assert found.bound == "communication"


def test_an_op_of_the_host_takes_its_bytes_at_the_bandwidth_of_its_memory():
    bandwidth = links_of(A100).host_memory_bytes_per_s * EFFICIENCY.link
    expected = 8e9 / bandwidth + EFFICIENCY.call_seconds
    assert seconds(shared(through_host(8e9, "in_host"))) == pytest.approx(expected)


def test_copies_are_waited_for_unless_they_are_on_another_stream():
    busy = [product(8192)] * 20
    alone = seconds(shared(ops=busy))
    waited, hidden = (
        seconds(shared(through_host(1e9, "to_host", overlaps), ops=busy))
        for overlaps in (False, True)
    )
    assert waited == pytest.approx(alone + seconds(shared(through_host(1e9, "to_host"))))
    assert hidden == alone


def test_most_cards_reach_the_host_over_16_lanes():
    speeds = {name: links_of(find_gpu(name)).host_bytes_per_s for name in CATALOGUE}
    assert (speeds["t4"], speeds["a100-40gb"], speeds["h100-80gb"]) == (16e9, 32e9, 64e9)
    assert (speeds["rtx-4060-laptop"], speeds["gh200"]) == (16e9, 450e9)


def test_collectives_that_overlap_hide_behind_kernels():
    busy = [product(8192)] * 20
    alone = seconds(shared(ops=busy))
    hidden, waited = (
        seconds(shared(gathered(1e9, overlaps), ops=busy), world_size=8)
        for overlaps in (True, False)
    )
    taken = seconds(shared(gathered(1e9)), world_size=8)
    assert alone < hidden < alone + taken / 2
    assert waited == pytest.approx(alone + taken)


def test_averages_run_beside_the_last_backward_pass_only():
    def averaged(size_bytes):
        return WindowWork(
            samples=4,
            forward=NOTHING,
            backward=Work.of([product(8192)]),
            later_forward=NOTHING,
            later_backward=Work.of([product(8192)]),
            update=NOTHING,
            averages=(gathered(size_bytes, collective="all_reduce"),),
        )

    added = [
        seconds(averaged(4e9), steps=steps, world_size=8)
        - seconds(averaged(0.0), steps=steps, world_size=8)
        for steps in (1, 4)
    ]
    assert added[0] == pytest.approx(added[1])
    assert added[0] > 0


def test_machines_are_reached_over_their_network():
    rtx = find_gpu("rtx-4090")
    within, across = (
        seconds(shared(gathered(1e9, ranks=ranks)), rtx, world_size=ranks) for ranks in (8, 16)
    )
    assert across > 2 * within


def test_a_sum_of_works_has_what_its_parts_have():
    first, second = Work.of([product(8), product(8)]), Work.of([product(8), elementwise(3.0)])
    both = first + second
    assert both.flops == first.flops + second.flops
    assert both.bytes == first.bytes + second.bytes
    assert both.calls == 4 and len(both.ops) == 2


@given(st.integers(1, 4096))
def test_a_work_at_any_size_lies_on_the_line_through_two(n):
    def at(samples):
        rows = 16.0 * samples
        op = OpWork(
            op="mm",
            kind="matmul",
            precision="bf16",
            flops=rows * 7,
            bytes=100 + rows,
            product=(1.0, rows, 5.0, 3.0),
        )
        return Work.of([op, elementwise(40.0), op], [gathered(10.0)])

    found, direct = Work.at(n, (2, at(2)), (3, at(3))), at(n)
    assert found.communication == direct.communication
    for op, other in zip(found.ops, direct.ops, strict=True):
        assert (op.op, op.calls) == (other.op, other.calls)
        assert (op.flops, op.bytes) == pytest.approx((other.flops, other.bytes))
        assert (op.product or ()) == pytest.approx(other.product or ())


def test_windows_of_other_calls_have_no_line():
    with pytest.raises(ValueError, match="not the same calls"):
        LinearWork.of((2, Work.of([product(8)])), (3, Work.of([elementwise(8.0)])))
