import math
from dataclasses import dataclass, field, replace
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from autobatch.devices.base import Run
from autobatch.errors import WorkloadError
from autobatch.gpus.catalogue import GpuSpec
from autobatch.memory.accounting import replay
from autobatch.memory.allocator import CachingAllocator
from autobatch.memory.scratch import with_scratch
from autobatch.memory.trace import Allocation, Bare, Kernel, Label, Mark, Trace
from autobatch.records.progress import silent
from autobatch.tuning import ceiling
from autobatch.tuning.ceiling import find_ceiling
from autobatch.tuning.first_sizes import first_size
from autobatch.tuning.probe import Probe
from autobatch.workload.workload import Workload

KIB = 2**10
MIB = 2**20

CARD = GpuSpec(name="fake", capacity_bytes=2**40)
WORKLOAD = Workload(model=nn.Linear(1, 1), batch=lambda n: None)


@dataclass
class FakeDevice:
    """Runs nothing: traces come from a function of the micro-batch, and every run is noted."""

    trace_at: object
    usable_bytes: int = 2**40
    executed: list[int] = field(default_factory=list)
    spec: GpuSpec = CARD
    evidence: str = "simulated"
    is_simulated: bool = True
    scratch_varies: bool = False
    must_run_the_plan: bool = False

    def run(self, workload, *, micro_batch, accumulation_steps):
        self.executed.append(micro_batch)
        trace = self.trace_at(micro_batch)
        return Run(
            trace=trace,
            replay=replay(trace),
            seconds=0.0,
            loss="user",
            optimizer="SGD",
            notes=(),
        )

    def allocator(self):
        return CachingAllocator()


def trace_of(micro_batch, sizes, *, events=None, op="aten::mm"):
    blocks = tuple(Allocation(size, "activations", "forward", op) for size in sizes)
    return Trace(
        micro_batch=micro_batch,
        accumulation_steps=2,
        blocks=blocks,
        events=tuple(range(len(blocks)) if events is None else events),
        marks=(Mark(0, "forward", 0, 0),),
    )


PRIME = first_size(WORKLOAD)


def polynomial(base, slope, bend=0):
    """Weights that stay, and one block that grows with the micro-batch, but for an offset.

    One trace does not tell how it grows.
    """
    return lambda n: trace_of(n, [64 * MIB, base + slope * n + bend * n * n])


def reserved_bytes(trace):
    return replay(trace).peak_reserved_bytes


def search(trace_at, budget_bytes, limit=2**16):
    device = FakeDevice(trace_at, budget_bytes)
    probe = Probe(device=device, workload=WORKLOAD, accumulation_steps=2, progress=silent)
    found = find_ceiling(probe, limit)
    assert device.executed == [trial.micro_batch for trial in probe.trials] == list(probe.runs)
    return found, device.executed


def proportional(slope, bend=0):
    """Weights that stay, and blocks that the samples alone decide, as most workloads have them."""

    def trace_at(n):
        trace = trace_of(n, [64 * MIB, slope * n, bend * n * n])
        weights, *others = trace.blocks
        paired = replace(others[1], label=Label(shape=(n, n)))
        return replace(trace, blocks=(replace(weights, category="parameters"), others[0], paired))

    return trace_at


def test_memory_that_the_samples_decide_takes_one_small_size_and_the_ceiling():
    found, executed = search(proportional(10 * MIB), 1064 * MIB)
    assert executed == [PRIME, 100]
    assert (found.micro_batch, found.limit_reached, found.reason) == (100, False, None)
    assert (found.model.degree, found.is_quadratic) == (1, False)


def test_pairs_of_samples_are_quadratic_and_take_no_size_more():
    trace_at = proportional(10 * MIB, MIB // 8)
    found, executed = search(trace_at, 1064 * MIB)
    assert reserved_bytes(trace_at(57)) <= 1064 * MIB < reserved_bytes(trace_at(58))
    assert executed == [PRIME, 57]
    assert (found.micro_batch, found.is_quadratic, found.method) == (
        57, True, "trace model (quadratic)",
    )  # fmt: skip


@pytest.mark.parametrize("budget", [65, 70, 75, 80, 90, 110, 164, 400])
def test_one_small_size_gives_the_ceiling_that_two_give(budget, monkeypatch):
    trace_at = proportional(6 * MIB)
    found, executed = search(trace_at, budget * MIB)
    assert reserved_bytes(trace_at(found.micro_batch + 1)) > budget * MIB
    assert not found.micro_batch or reserved_bytes(trace_at(found.micro_batch)) <= budget * MIB
    assert len(executed) == (2 if found.micro_batch > 1 else 3)
    monkeypatch.setattr(ceiling, "first_size", lambda workload: 2**20)
    assert search(trace_at, budget * MIB)[0].micro_batch == found.micro_batch


@pytest.mark.parametrize(
    ("extra", "executions"),
    [
        (lambda n: (n + 1) * KIB, 3),  # an offset
        (lambda n: PRIME * KIB, 3),  # a dimension that is a multiple of the prime
        (lambda n: -(-n // 2) * KIB, 4),  # half of the samples
        (lambda n: n * n * KIB, 4),  # pairs of samples that no shape tells of
    ],
)
def test_an_execution_corrects_what_one_small_size_seemed_to_tell(extra, executions):
    def trace_at(n):
        trace = proportional(10 * MIB)(n)
        blocks = (*trace.blocks, Allocation(extra(n), "activations", "forward", "aten::cat"))
        return replace(trace, blocks=blocks, events=(*trace.events, 3))

    found, executed = search(trace_at, 1065 * MIB)
    assert executed[0] == PRIME and len(executed) <= executions
    assert reserved_bytes(trace_at(found.micro_batch)) <= 1065 * MIB
    assert reserved_bytes(trace_at(found.micro_batch + 1)) > 1065 * MIB


def test_a_loop_over_samples_is_not_executed_at_a_size_that_one_run_foretells():
    def trace_at(n):
        return trace_of(n, [64 * MIB, 10 * MIB * n, *[KIB] * n])

    _, executed = search(trace_at, 1065 * MIB)
    assert executed[:3] == [PRIME, 2, 3]


def test_what_fails_at_the_prime_is_tried_with_fewer_samples():
    class Even(FakeDevice):
        def run(self, workload, *, micro_batch, accumulation_steps):
            if micro_batch == PRIME:
                raise WorkloadError("two views of each sample")
            return FakeDevice.run(
                self, workload, micro_batch=micro_batch, accumulation_steps=accumulation_steps
            )

    device = Even(proportional(10 * MIB), 1064 * MIB)
    probe = Probe(device=device, workload=WORKLOAD, accumulation_steps=2, progress=silent)
    assert find_ceiling(probe, 2**16).micro_batch == 100
    assert device.executed == [2, 3, 100]


@pytest.mark.parametrize("wanted", [PRIME, 40, 100])
def test_what_one_small_size_tells_is_confirmed_by_whole_windows(wanted):
    device = FakeDevice(proportional(10 * MIB), 1064 * MIB)
    probe = Probe(device=device, workload=WORKLOAD, accumulation_steps=2, progress=silent)
    found = find_ceiling(probe, 2**16, wanted)
    assert (found.micro_batch, device.executed, found.whole) == (100, [PRIME, 100], None)


def test_where_code_takes_another_way_below_the_first_size_two_smaller_ones_tell():
    def trace_at(n):
        extra = [n * MIB] if n > 16 else []
        return trace_of(n, [10 * MIB * n, *extra])

    found, executed = search(trace_at, 90 * MIB)
    assert executed == [PRIME, 7, 2, 3, 9]
    assert (found.micro_batch, found.method) == (9, "trace model")


def test_affine_memory_takes_two_small_sizes_more():
    found, executed = search(polynomial(100 * MIB, 10 * MIB), 1164 * MIB)
    assert executed == [PRIME, 2, 3, 100]
    assert (found.micro_batch, found.limit_reached, found.reason) == (100, False, None)
    assert found.model.degree == 1


def search_a_real_one(trace_at, foreseen_at, budget_bytes, *, prove=True):
    """Search a card whose kernels vary, with a simulation of it that is not quite right."""
    sides = []
    for at, is_real in ((foreseen_at, False), (trace_at, True)):
        device = FakeDevice(at, budget_bytes, scratch_varies=is_real, must_run_the_plan=is_real)
        sides.append(Probe(device=device, workload=WORKLOAD, accumulation_steps=2, progress=silent))
    simulated, probe = sides
    found = find_ceiling(probe, 2**16, prove=prove, foresee=lambda: find_ceiling(simulated, 2**16))
    return found, probe.device.executed


def with_a_kernel_for_large_sizes(n):
    """From 50 samples on, a kernel takes scratch memory."""
    weights, activations = 64 * MIB, (100 + 10 * n) * MIB
    if n < 50:
        return trace_of(n, [weights, activations])
    return trace_of(n, [weights, activations, 80 * MIB], events=[0, 1, 2, ~2])


@pytest.mark.parametrize(
    ("foreseen", "real", "executed"),
    [
        # 50 MiB, then 30 MiB more than foreseen at every size
        (polynomial(100 * MIB, 10 * MIB), polynomial(150 * MIB, 10 * MIB), [95, 2, 96]),
        (polynomial(100 * MIB, 10 * MIB), polynomial(130 * MIB, 10 * MIB), [95, 97, 98]),
        # a tenth less, and a fifth more, for each sample
        (polynomial(100 * MIB, 9 * MIB), polynomial(100 * MIB, 10 * MIB), [105, 99, 100, 101]),
        (polynomial(100 * MIB, 12 * MIB), polynomial(100 * MIB, 10 * MIB), [78, 96, 100, 101]),
        (polynomial(100 * MIB, 10 * MIB), with_a_kernel_for_large_sizes, [95, 92, 93]),
        (polynomial(0, 10 * MIB), polynomial(0, 10 * MIB, MIB // 100), [104, 99, 100, 101]),
    ],
)
def test_a_real_gpu_is_probed_close_to_the_ceiling_that_a_simulation_foresees(
    foreseen, real, executed
):
    budget = 1164 * MIB
    found, sizes = search_a_real_one(real, foreseen, budget)
    assert reserved_bytes(real(found.micro_batch)) <= budget
    assert reserved_bytes(real(found.micro_batch + 1)) > budget
    assert sizes == executed
    assert found.method == "trace model"


class SharedDevice(FakeDevice):
    """A card of which others take so much that only the first execution runs through."""

    def run(self, workload, *, micro_batch, accumulation_steps):
        run = FakeDevice.run(
            self, workload, micro_batch=micro_batch, accumulation_steps=accumulation_steps
        )
        return run if len(self.executed) == 1 else replace(run, shortage="others came")


def test_a_search_ends_where_others_take_the_card_after_its_first_execution():
    foreseen = polynomial(100 * MIB, 10 * MIB)
    sides = (FakeDevice(foreseen, 1164 * MIB), SharedDevice(foreseen, 1164 * MIB))
    simulated, probe = (
        Probe(device=device, workload=WORKLOAD, accumulation_steps=2, progress=silent)
        for device in sides
    )
    assert find_ceiling(probe, 2**16, foresee=lambda: find_ceiling(simulated, 2**16)).model is None
    assert probe.device.executed[0] == 95


def test_where_a_simulation_fails_a_real_gpu_is_probed_at_small_sizes():
    device = FakeDevice(
        polynomial(100 * MIB, 10 * MIB),
        1164 * MIB,
        is_simulated=False,
        scratch_varies=True,
        must_run_the_plan=True,
    )
    probe = Probe(device=device, workload=WORKLOAD, accumulation_steps=2, progress=silent)
    assert find_ceiling(probe, 2**16, foresee=lambda: None).micro_batch == 100
    assert device.executed == [2, 3, 100]


def test_quadratic_memory_is_found_where_the_line_misses():
    trace_at = polynomial(100 * MIB, 10 * MIB, MIB // 8)
    found, executed = search(trace_at, 1164 * MIB)
    assert reserved_bytes(trace_at(57)) <= 1164 * MIB < reserved_bytes(trace_at(58))
    assert executed == [PRIME, 2, 3, 57]  # a line through 2 and 3 promises 94, and misses the prime
    assert found.micro_batch == 57
    assert found.model.degree == 2


def experts(chosen, number, each=MIB):
    """Rows of a sample, and as many for one of so many experts as an equal part has."""

    def trace_at(n):
        part = Fraction(chosen * n, number)
        trace = trace_of(n, [64 * MIB, n * each, math.ceil(part) * each])
        return replace(trace, parts=(part,))

    return trace_at


@pytest.mark.parametrize(
    ("chosen", "number", "executed"),
    [(2, 4, [2, 3, 4, 5]), (1, 8, [2, 3, 9, 10, 17]), (4, 10, [2, 3, 4, 6]), (4, 2, [2, 3])],
)
@pytest.mark.parametrize("budget", [1164 * MIB, 1165 * MIB, 2**34])
def test_counts_that_are_rounded_up_have_a_model_and_are_no_quadratic(
    chosen, number, executed, budget
):
    trace_at = experts(chosen, number)
    found, sizes = search(trace_at, budget)
    assert sizes == [PRIME, *executed, found.micro_batch]
    assert reserved_bytes(trace_at(found.micro_batch)) <= budget
    assert reserved_bytes(trace_at(found.micro_batch + 1)) > budget
    assert found.method == "trace model"
    assert all(found.model.difference(trace_at(n)) is None for n in (4, 33, 40, 999))


@pytest.mark.parametrize("limit", [4, 5, 64, 999, 1000])
def test_memory_that_grows_in_steps_is_not_called_quadratic_where_the_limit_is_reached(limit):
    found, _ = search(lambda n: trace_of(n, [n * KIB, -(-n // 3) * KIB]), 2**40, limit)
    assert (found.micro_batch, found.limit_reached) == (limit, True)
    assert not found.is_quadratic


def test_quadratic_memory_is_called_so_where_the_limit_is_reached():
    found, executed = search(polynomial(100 * MIB, 10 * MIB, MIB // 8), 2**40, 1000)
    assert found.is_quadratic
    assert executed == [PRIME, 2, 3, 1000]


@pytest.mark.parametrize("budget", [400 * MIB, 401 * MIB, 402 * MIB])
def test_a_model_that_foretells_negative_sizes_is_refuted(budget):
    """Half of the rows go on: 1 of 2, 2 of 3, 5 of 10."""

    def trace_at(n):
        trace = trace_of(n, [64 * MIB, n * MIB, -(-n // 2) * MIB, max(4, 8 - n) * MIB])
        kernel = Kernel(
            kind="rows", name="scratch", phase="forward", stream=0, start=1, results=(), end=2,
            marks=1, numbers=(-(-n // 2), max(0, 8 - n), -1), takes=takes,
        )  # fmt: skip
        return with_scratch(Bare(trace, (kernel,)))

    def takes(numbers):
        assert min(numbers[:2]) >= 0
        return [numbers[0] * MIB]

    found, _ = search(trace_at, budget)
    assert reserved_bytes(trace_at(found.micro_batch)) <= budget
    assert reserved_bytes(trace_at(found.micro_batch + 1)) > budget
    assert not found.is_quadratic


def test_memory_that_no_quadratic_follows_has_its_boundary_executed():
    def trace_at(n):
        return trace_of(n, [64 * MIB, 2 * MIB * n + n**3 * KIB])

    found, executed = search(trace_at, 1000 * MIB)
    assert reserved_bytes(trace_at(91)) <= 1000 * MIB < reserved_bytes(trace_at(92))
    assert found.micro_batch == 91
    assert found.model is None or not found.model.is_exact
    assert {91, 92} <= set(executed)
    assert len(executed) < 24


@pytest.mark.parametrize("budget", [300, 800, 1000, 2000, 5000, 17_000])
@pytest.mark.parametrize(
    "padded",
    [
        lambda n: 1 << (n - 1).bit_length(),
        lambda n: -(-n // 8) * 8,
        lambda n: -(-n // 64) * 64,
        lambda n: min((size for size in (100, 250, 700, 2500) if size >= n), default=n),
    ],
    ids=["powers of two", "eights", "64s", "buckets"],
)
def test_of_batches_that_are_padded_the_boundary_is_executed(padded, budget):
    def trace_at(n):
        return trace_of(n, [64 * MIB, MIB * padded(n), MIB // 2 * padded(n)])

    found, executed = search(trace_at, budget * MIB)
    ceiling = found.micro_batch
    assert reserved_bytes(trace_at(ceiling)) <= budget * MIB < reserved_bytes(trace_at(ceiling + 1))
    assert {ceiling, ceiling + 1} <= set(executed)


def test_small_traces_that_differ_in_order_are_bisected_from_what_they_showed():
    def trace_at(n):
        sizes = [64 * MIB, 10 * MIB * n]
        return trace_of(n, sizes, op="aten::mm" if n % 2 else "aten::bmm")

    found, executed = search(trace_at, 1064 * MIB)
    assert executed == [PRIME, 2, 3, 100, 101]
    assert found.micro_batch == 100
    assert "traces at micro-batch 2 and 3 differ at event 0" in found.reason


def test_an_order_that_only_large_sizes_have_is_learned_from_them():
    def trace_at(n):
        extra = [] if n < 50 else [512]
        return trace_of(n, [64 * MIB, 10 * MIB * n, *extra])

    found, executed = search(trace_at, 1065 * MIB)
    assert executed == [PRIME, 2, 3, 100, 99]
    assert (found.micro_batch, found.method, found.reason) == (99, "trace model", None)


def test_where_memory_shrinks_again_far_above_the_first_boundary_is_the_answer():
    # Below 10 MiB a block takes a segment of 20 MiB, from there on one of its own size.
    def trace_at(n):
        return trace_of(n, [n * MIB // 4])

    peaks = {n: reserved_bytes(trace_at(n)) // MIB for n in (4, 5, 39, 40, 60)}
    assert peaks == {4: 2, 5: 20, 39: 20, 40: 10, 60: 16}
    found, executed = search(trace_at, 16 * MIB)
    assert found.micro_batch == 4
    assert executed == [PRIME, 4]


def test_a_dent_of_two_sizes_above_the_first_misfit_is_looked_through():
    # Three blocks: of 6 MiB they share a segment of 20, of 9 they need two, of 10.5 one of 12 each.
    def trace_at(n):
        return trace_of(n, [n * 1536 * KIB] * 3)

    budget = 36 * MIB
    assert [n for n in range(1, 40) if reserved_bytes(trace_at(n)) <= budget] == [1, 2, 3, 4, 7, 8]
    found, executed = search(trace_at, budget)
    assert found.micro_batch == 8
    assert executed == [PRIME, 8]


def test_only_one_sample_fits_and_was_executed():
    found, executed = search(polynomial(100 * MIB, 50 * MIB), 220 * MIB)
    assert executed == [PRIME, 2, 3, 1]
    assert (found.micro_batch, found.limit_reached) == (1, False)


def test_one_sample_with_an_order_of_its_own_is_believed_and_not_the_model():
    def trace_at(n):
        sizes = [64 * MIB, 50 * MIB * n]
        return trace_of(n, sizes if n > 1 else [*sizes, 200 * MIB])

    found, executed = search(trace_at, 120 * MIB)
    assert executed == [PRIME, 2, 1]
    assert found.micro_batch == 0


def test_a_ceiling_at_a_size_the_model_was_made_from_is_checked_just_above():
    two, executed = search(polynomial(100 * MIB, 50 * MIB), 270 * MIB)
    assert (two.micro_batch, executed) == (2, [PRIME, 2, 3, 4])
    three, executed = search(polynomial(100 * MIB, 50 * MIB), 320 * MIB)
    assert (three.micro_batch, executed) == (3, [PRIME, 2, 3, 4])


def test_nothing_fits_after_three_sizes():
    found, executed = search(proportional(50 * MIB), 100 * MIB)
    assert executed == [PRIME, 2, 1]
    assert (found.micro_batch, found.limit_reached) == (0, False)


@pytest.mark.parametrize(
    ("limit", "executed"),
    [(1, [1]), (2, [2]), (3, [2, 3]), (4, [2, 3, 4]), (500, [PRIME, 2, 3, 500])],
)
def test_a_limit_that_fits_is_executed_and_reported_as_reached(limit, executed):
    found, sizes = search(polynomial(0, KIB), 1024 * MIB, limit)
    assert sizes == executed
    assert (found.micro_batch, found.limit_reached) == (limit, True)


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_a_small_limit_at_which_nothing_fits_ends_with_one_sample(limit):
    found, executed = search(polynomial(100 * MIB, 50 * MIB), 100 * MIB, limit)
    assert executed == {1: [1], 2: [2, 1], 3: [2, 3, 1]}[limit]
    assert (found.micro_batch, found.limit_reached) == (0, False)


def test_a_limit_of_two_at_which_only_one_fits_executes_both():
    found, executed = search(polynomial(100 * MIB, 50 * MIB), 220 * MIB, limit=2)
    assert executed == [2, 1]
    assert (found.micro_batch, found.limit_reached) == (1, False)


def test_progress_counts_what_has_run_before_each_execution():
    seen = []
    probe = Probe(
        device=FakeDevice(polynomial(100 * MIB, 10 * MIB, MIB // 8), 1164 * MIB),
        workload=WORKLOAD,
        accumulation_steps=2,
        progress=seen.append,
    )
    find_ceiling(probe, 2**16)
    begins = [p for p in seen if p.trial is None]
    assert [(p.executions, p.expected, p.micro_batch) for p in begins] == [
        (0, 2, PRIME),
        (1, 2, 2),
        (2, 3, 3),
        (3, 4, 57),
    ]
    ends = [(p.executions, p.trial) for p in seen if p.trial is not None]
    assert ends == list(enumerate(probe.trials, 1))


def test_a_trial_tells_what_its_size_took_and_whether_that_fits():
    trace_at = polynomial(100 * MIB, 10 * MIB)
    probe = Probe(
        device=FakeDevice(trace_at, reserved_bytes(trace_at(3)) - 1),
        workload=WORKLOAD,
        accumulation_steps=2,
        progress=silent,
    )
    assert [probe.fits(2), probe.fits(3), probe.fits(3)] == [True, False, False]
    assert [trial.fits for trial in probe.trials] == [True, False]
    assert [trial.peak_reserved_bytes for trial in probe.trials] == [
        reserved_bytes(trace_at(2)),
        reserved_bytes(trace_at(3)),
    ]
    assert not any(trial.oom or trial.alloc_retries for trial in probe.trials)


def test_a_run_with_other_accumulation_steps_is_a_trial_but_no_evidence_for_the_search():
    probe = Probe(
        device=FakeDevice(polynomial(0, MIB)),
        workload=WORKLOAD,
        accumulation_steps=2,
        progress=silent,
    )
    probe.execute(8, 1)
    assert probe.runs == {} and [t.accumulation_steps for t in probe.trials] == [1]


@st.composite
def windows(draw, degree):
    """Return traces of a random window whose blocks grow with the micro-batch at most."""
    scale = st.sampled_from([1, 512, 3000, 100 * KIB, MIB, 7 * MIB])
    count = st.integers(0, 9)
    rows = draw(st.lists(st.tuples(count, scale, count, scale, count), min_size=1, max_size=8))
    events, live = [], []
    for index in range(len(rows)):
        events.append(index)
        live.append(index)
        while live and draw(st.integers(0, 2)) == 0:
            events.append(~live.pop(draw(st.integers(0, len(live) - 1))))

    def trace_at(n):
        sizes = [
            base * unit + slope * step * n + (bend * step // 8 * n * n if degree == 2 else 0)
            for base, unit, slope, step, bend in rows
        ]
        return trace_of(n, sizes, events=events)

    return trace_at


def assert_boundary(found, trace_at, budget, limit):
    """What fits, and by brute force: the largest one if memory never shrinks on the way there."""
    peaks = [reserved_bytes(trace_at(n)) for n in range(1, limit + 1)]
    fits = [0, *(n for n, peak in enumerate(peaks, 1) if peak <= budget)]
    assert found.micro_batch in fits
    assert found.micro_batch + 1 not in fits
    assert found.limit_reached == (found.micro_batch == limit)
    if peaks == sorted(peaks):
        assert found.micro_batch == fits[-1]


budgets = st.integers(1, 400).map(lambda n: n * MIB)
limits = st.integers(1, 60)


@settings(deadline=None)
@given(windows(degree=1), budgets, limits)
def test_the_ceiling_of_affine_memory_is_that_of_brute_force_in_four_executions(
    trace_at, budget, limit
):
    found, executed = search(trace_at, budget, limit)
    assert_boundary(found, trace_at, budget, limit)
    assert len(executed) <= 4


@settings(deadline=None)
@given(windows(degree=2), budgets, limits)
def test_the_ceiling_of_quadratic_memory_is_that_of_brute_force_in_five_executions(
    trace_at, budget, limit
):
    found, executed = search(trace_at, budget, limit)
    assert_boundary(found, trace_at, budget, limit)
    assert len(executed) <= 5


@settings(deadline=None)
@given(windows(degree=2), budgets, limits, st.integers(0, 2**16))
def test_the_ceiling_is_that_of_brute_force_where_traces_never_align(trace_at, budget, limit, seed):
    def shuffled(n):
        trace = trace_at(n)
        extra = hash((seed, n)) % 3
        return trace_of(
            n,
            [*trace.sizes, *[512] * extra],
            events=(*trace.events, *range(len(trace.sizes), len(trace.sizes) + extra)),
        )

    found, executed = search(shuffled, budget, limit)
    if found.model is None:
        assert_boundary(found, shuffled, budget, limit)
    else:  # the executed sizes happened to be in one order; others need not be
        assert not found.micro_batch or reserved_bytes(shuffled(found.micro_batch)) <= budget
    assert len(executed) == len(set(executed))


@dataclass
class SlowDevice(FakeDevice):
    """A real card that takes a second a sample, on a clock that the test reads."""

    is_simulated: bool = False
    clock: list[float] = field(default_factory=lambda: [0.0])

    def run(self, workload, *, micro_batch, accumulation_steps):
        run = super().run(workload, micro_batch=micro_batch, accumulation_steps=accumulation_steps)
        self.clock[0] += micro_batch
        return replace(run, seconds=float(micro_batch))


@pytest.mark.parametrize("share", [4, 640])
def test_sizes_that_run_one_by_one_end_at_the_time_limit_with_at_least(share):
    kinds = ["aten::mm", "aten::add"]  # traces that do not align
    device = SlowDevice(lambda n: trace_of(n, [n * MIB], op=kinds[n % 2]))
    probe = Probe(device=device, workload=WORKLOAD, accumulation_steps=2, progress=silent)
    found = find_ceiling(probe, 2**16, share=share)
    assert found.stopped and found.limit_reached and found.method == "bisection"
    assert found.micro_batch == max(device.executed) >= 3
    assert device.clock[0] <= 5 + ceiling.SECONDS_BEYOND


@dataclass
class BusyDevice(FakeDevice):
    """A simulated card on a machine that is busy for a while."""

    busy: int = 0

    def run(self, workload, *, micro_batch, accumulation_steps):
        run = super().run(workload, micro_batch=micro_batch, accumulation_steps=accumulation_steps)
        return replace(run, seconds=60.0 if len(self.executed) > self.busy else 0.01)


def test_where_sizes_run_one_by_one_the_ceiling_does_not_depend_on_how_busy_the_machine_is(
    monkeypatch,
):
    monkeypatch.setattr(ceiling, "_SECONDS_AN_EVENT", 0.4)
    kinds = ["aten::mm", "aten::add"]
    found = set()
    for busy in (0, 3, 100):
        device = BusyDevice(lambda n: trace_of(n, [MIB] * n, op=kinds[n % 2]), busy=busy)
        probe = Probe(device=device, workload=WORKLOAD, accumulation_steps=2, progress=silent)
        ended = find_ceiling(probe, 2**16, share=4)
        found.add((ended.micro_batch, ended.stopped, tuple(device.executed)))
    [(micro_batch, stopped, _)] = found
    assert micro_batch > 4 and stopped
