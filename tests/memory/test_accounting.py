import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from autobatch.devices.virtual.gpu import VirtualGpu
from autobatch.gpus.catalogue import GpuSpec
from autobatch.memory.accounting import (
    curve_sizes,
    footprint_of,
    memory_point,
    replay,
    timeline_of,
    whole_window,
)
from autobatch.memory.allocator import CachingAllocator
from autobatch.memory.replay import simulate
from autobatch.memory.trace import CATEGORIES, Allocation, Mark, Trace
from autobatch.memory.trace_model import TraceModel
from autobatch.workload.workload import Workload

MIB = 2**20
GPU = GpuSpec(name="card", capacity_bytes=8 * 2**30, context_bytes=300 * MIB)


class Residual(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return x + self.conv(F.relu(self.norm(x), inplace=True))


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(32, 4, 64) for _ in range(2))
        self.head = nn.Linear(32, 7)

    def forward(self, x):
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return self.head(x)


class TiedTagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(500, 24)
        self.rnn = nn.LSTM(24, 24, num_layers=2, batch_first=True, dropout=0.1)
        self.out = nn.Linear(24, 500, bias=False)
        self.out.weight = self.words.weight
        self.register_buffer("scale", torch.ones(24))

    def forward(self, tokens):
        states, _ = self.rnn(self.words(tokens) * self.scale)
        return F.cross_entropy(self.out(states).flatten(0, 1), tokens.flatten())


class Towers(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(64, 32), nn.Linear(48, 32)

    def forward(self, left, right):
        logits = self.left(left) @ self.right(right).T
        labels = torch.arange(logits.shape[0], device=logits.device)
        return F.cross_entropy(logits, labels)


def frozen_backbone():
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
    model[0].requires_grad_(False)
    return model


def momentum(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.01)


WORKLOADS = {
    "cnn": Workload(
        model=nn.Sequential(nn.Conv2d(3, 8, 3), Residual(8), Residual(8)),
        batch=lambda n: torch.zeros(n, 3, 24, 24),
        optimizer=momentum,
    ),
    "checkpointed transformer in bf16": Workload(
        model=Checkpointed(),
        batch=lambda n: torch.zeros(16, n, 32),
        autocast="bf16",
        clip_norm=1.0,
    ),
    "recurrent tagger": Workload(
        model=TiedTagger(), batch=lambda n: torch.zeros(n, 12, dtype=torch.int64)
    ),
    "contrastive in fp16": Workload(
        model=Towers(),
        batch=lambda n: {"left": torch.zeros(n, 64), "right": torch.zeros(n, 48)},
        autocast="fp16",
    ),
    "frozen backbone with evaluation": Workload(
        model=frozen_backbone(),
        batch=lambda n: torch.zeros(n, 64),
        optimizer=torch.optim.RMSprop,
        evaluate=lambda model, batch: model(batch).argmax(1),
    ),
}


@pytest.fixture(scope="module", params=WORKLOADS, ids=lambda name: name.replace(" ", "-"))
def trace(request):
    return VirtualGpu(GPU).run(WORKLOADS[request.param], micro_batch=5, accumulation_steps=2).trace


def test_at_every_instant_the_categories_sum_to_the_allocated_bytes(trace):
    totals = dict.fromkeys(CATEGORIES, 0)
    live = set()
    for event, expected in zip(trace.events, trace.allocated(), strict=True):
        index = event if event >= 0 else ~event
        block = trace.blocks[index]
        if event >= 0:
            assert index not in live
            live.add(index)
        else:
            live.remove(index)
        totals[block.category] += block.size_bytes if event >= 0 else -block.size_bytes
        assert min(totals.values()) >= 0
        assert sum(totals.values()) == expected
        assert sum(trace.blocks[i].size_bytes for i in live) == expected
    for event in range(0, len(trace.events), max(1, len(trace.events) // 50)):
        assert sum(trace.by_category(event).values()) == trace.allocated()[event]


def test_after_the_windows_only_the_model_its_optimizer_and_workspaces_stay(trace):
    left = trace.by_category(len(trace.events) - 1)
    assert left["parameters"] > 0
    assert {name for name, size in left.items() if size} <= {
        "parameters",
        "buffers",
        "optimizer_state",
        "workspace",
        "other",
    }


def test_a_real_footprint_sums_to_the_allocators_peak(trace):
    replayed = replay(trace)
    footprint = footprint_of(trace, replayed, GPU, "simulated", simulated=True)
    assert sum(footprint.categories.values()) == footprint.peak_allocated_bytes
    assert footprint.rounding_bytes >= 0
    assert footprint.peak_allocated_bytes >= max(trace.allocated())
    assert footprint.peak_reserved_bytes >= footprint.peak_allocated_bytes
    assert footprint.cached_bytes >= 0
    assert footprint.peak_device_bytes == footprint.peak_reserved_bytes + GPU.context_bytes


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_window_of_one_micro_batch_is_read_off_one_of_several(name):
    card = VirtualGpu(GPU)
    several, one = (
        card.run(WORKLOADS[name], micro_batch=5, accumulation_steps=steps) for steps in (2, 1)
    )
    found = whole_window(several.trace, "simulated")
    executed = footprint_of(one.trace, one.replay, GPU, "simulated", simulated=True)
    assert found.peak_allocated_bytes == executed.peak_allocated_bytes
    assert dict(found.categories) == executed.categories


def test_what_was_allocated_before_counts_as_other():
    trace = VirtualGpu(GPU).run(WORKLOADS["cnn"], micro_batch=5, accumulation_steps=2).trace
    before = CachingAllocator()
    before.malloc(3 * MIB)
    held, free = whole_window(trace, "measured", before), whole_window(trace, "measured")
    assert held.categories["other"] - free.categories["other"] == 3 * MIB
    assert sum(held.categories.values()) == held.peak_allocated_bytes


def test_parameters_buffers_and_optimizer_state_are_counted_once_at_their_size():
    model = WORKLOADS["recurrent tagger"].model
    trace = (
        VirtualGpu(GPU)
        .run(WORKLOADS["recurrent tagger"], micro_batch=3, accumulation_steps=2)
        .trace
    )
    footprint = footprint_of(trace, replay(trace), GPU, "simulated", simulated=True)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    assert footprint.parameters_bytes == weights
    assert footprint.buffers_bytes == 24 * 4
    assert footprint.optimizer_bytes == 2 * weights  # AdamW; its step counts live on the CPU


def test_a_frozen_backbone_has_no_gradient_and_no_optimizer_state():
    trace = (
        VirtualGpu(GPU)
        .run(WORKLOADS["frozen backbone with evaluation"], micro_batch=3, accumulation_steps=2)
        .trace
    )
    head_bytes = (256 * 10 + 10) * 4
    peaks = [trace.by_category(event) for event in range(len(trace.events))]
    assert max(peak["gradients"] for peak in peaks) == head_bytes
    assert peaks[-1]["optimizer_state"] == head_bytes  # RMSprop keeps one square average


@st.composite
def traces(draw):
    """Return a random trace over all categories."""
    blocks, events, live = [], [], []
    for index in range(draw(st.integers(1, 30))):
        size = draw(st.sampled_from([0, 1, 512, 1000, MIB, 3 * MIB, 11 * MIB]))
        blocks.append(Allocation(size, draw(st.sampled_from(CATEGORIES)), "forward", "op"))
        events.append(index)
        live.append(index)
        while live and draw(st.booleans()):
            events.append(~live.pop(draw(st.integers(0, len(live) - 1))))
    return Trace(
        micro_batch=4,
        accumulation_steps=2,
        blocks=tuple(blocks),
        events=tuple(events),
        marks=(Mark(0, "forward", 0, 0),),
    )


@settings(deadline=None)
@given(traces())
def test_a_footprint_sums_exactly_to_the_peak_of_any_trace(trace):
    replayed = replay(trace)
    footprint = footprint_of(trace, replayed, GPU, "predicted", simulated=True)
    assert sum(footprint.categories.values()) == footprint.peak_allocated_bytes
    assert footprint.peak_allocated_bytes == replayed.peak_allocated_bytes
    assert (footprint.micro_batch, footprint.accumulation_steps) == (4, 2)
    assert (footprint.gpu, footprint.evidence) == ("card", "predicted")


def test_a_footprint_counts_what_is_alive_at_the_peak_and_nothing_else():
    kinds = ["parameters", "buffers", "gradients", "optimizer_state", "activations"]
    kinds += ["temporaries", "inputs", "workspace", "other"]
    blocks = [Allocation(512 * (i + 1), kind, "forward", "op") for i, kind in enumerate(kinds)]
    blocks.append(Allocation(512 * 20, "temporaries", "backward", "op"))
    trace = Trace(
        micro_batch=1,
        accumulation_steps=1,
        blocks=tuple(blocks),
        events=(*range(9), *(~i for i in range(9)), 9),
        marks=(),
    )
    footprint = footprint_of(trace, replay(trace), GPU, "simulated", simulated=True)
    values = list(footprint.categories.values())
    assert values == [*(512 * (i + 1) for i in range(9)), 0]
    assert footprint.peak_allocated_bytes == 512 * 45


def test_rounding_is_what_blocks_take_beyond_their_request():
    block = Allocation(1000, "inputs", "inputs", "op")
    trace = Trace(micro_batch=1, accumulation_steps=1, blocks=(block,), events=(0,), marks=())
    footprint = footprint_of(trace, replay(trace), GPU, "simulated", simulated=True)
    assert (footprint.inputs_bytes, footprint.rounding_bytes) == (1000, 24)


def test_replay_without_a_limit_fits_a_budget_exactly_if_its_peak_does(trace):
    peak = replay(trace).peak_reserved_bytes
    assert simulate(trace.sizes, trace.events, allocator=CachingAllocator(limit_bytes=peak)).fits
    assert not simulate(
        trace.sizes, trace.events, allocator=CachingAllocator(limit_bytes=peak - 1)
    ).fits


def repeated(trace, times):
    count = len(trace.blocks)
    shifted = (
        e + count * i if e >= 0 else e - count * i for i in range(times) for e in trace.events
    )
    return Trace(
        micro_batch=4,
        accumulation_steps=2,
        blocks=trace.blocks * times,
        events=tuple(shifted),
        marks=trace.marks,
    )


@pytest.mark.slow
@settings(deadline=None)
@given(traces(), st.sampled_from([1, 50]))
def test_a_timeline_keeps_the_peak_and_adds_up_at_every_sample(trace, times):
    trace = repeated(trace, times)
    replayed = replay(trace)
    timeline = timeline_of(trace)
    allocated = trace.allocated()
    events = [sample.event for sample in timeline.samples]
    assert events == sorted(set(events))
    assert len(events) <= 401
    assert timeline.peak_event == replayed.peak_event
    assert timeline.peak_event in events
    assert max(s.allocated_bytes for s in timeline.samples) == replayed.peak_allocated_bytes
    for sample in timeline.samples:
        assert sum(sample.categories.values()) == allocated[sample.event]
        assert allocated[sample.event] <= sample.allocated_bytes <= sample.reserved_bytes


def test_the_timeline_of_real_windows_shows_their_phases_and_their_peak(trace):
    timeline = timeline_of(trace)
    footprint = footprint_of(trace, replay(trace), GPU, "simulated", simulated=True)
    peak = next(s for s in timeline.samples if s.event == timeline.peak_event)
    shown = {name: size for name, size in footprint.categories.items() if name in peak.categories}
    assert shown == dict(peak.categories)
    assert peak.allocated_bytes == footprint.peak_allocated_bytes
    phases = [(phase, window, step) for _, phase, window, step in timeline.marks]
    assert phases[0] == ("setup", 0, 0)
    assert phases[1:8] == [
        *((phase, 0, step) for step in (0, 1) for phase in ("inputs", "forward", "backward")),
        ("step", 0, 1),
    ]
    assert phases[8][:2] == ("inputs", 1)


def test_a_short_timeline_keeps_every_event():
    block = Allocation(512, "inputs", "inputs", "op")
    trace = Trace(
        micro_batch=1, accumulation_steps=1, blocks=(block, block), events=(0, ~0, 1), marks=()
    )
    assert [(s.event, s.allocated_bytes) for s in timeline_of(trace).samples] == [
        (0, 512),
        (1, 0),
        (2, 512),
    ]


@given(st.integers(1, 100_000))
def test_a_curve_runs_from_one_to_a_little_beyond_the_ceiling(ceiling):
    sizes = curve_sizes(ceiling)
    assert sizes[0] == 1
    assert ceiling < sizes[-1] <= ceiling + max(1, ceiling // 8)
    assert sizes == sorted(set(sizes))
    assert len(sizes) <= 7


def test_a_curve_leaves_out_what_is_known_already():
    assert curve_sizes(80) == [1, 15, 30, 45, 60, 75, 90]
    assert curve_sizes(80, known=[2, 3, 80]) == [15, 30, 45, 60, 90]


def test_a_predicted_point_is_what_the_size_takes_when_executed():
    workload = WORKLOADS["cnn"]
    traces = {
        n: VirtualGpu(GPU).run(workload, micro_batch=n, accumulation_steps=2).trace
        for n in (2, 3, 9)
    }
    model = TraceModel.fit([traces[2], traces[3]])
    point = memory_point(9, replay(model.trace(9)), "predicted")
    replayed = replay(traces[9])
    assert point.peak_allocated_bytes == replayed.peak_allocated_bytes
    assert point.peak_reserved_bytes == replayed.peak_reserved_bytes
