"""What a simulated run counts is what formulas on paper give."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from autobatch.devices.virtual.gpu import VirtualGpu
from autobatch.devices.virtual.work import WorkCounter
from autobatch.gpus.catalogue import find_gpu
from autobatch.gpus.work import WindowWork, Work
from autobatch.workload.sample import batch_builder
from autobatch.workload.workload import Workload

N = 8


def work(model, sample=None, *, steps=1, gpu="a100-40gb", n=N, **options) -> WindowWork:
    options.setdefault("loss", lambda model, batch: model(batch).sum())
    options.setdefault("optimizer", lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    workload = Workload(model=model, batch=batch_builder(sample), **options)
    device = VirtualGpu(find_gpu(gpu), counts_work=True)
    found = device.run(workload, micro_batch=n, accumulation_steps=steps).work
    assert found is not None
    return found


def of(part: Work, op: str):
    (found,) = [one for one in part.ops if one.op == op]
    return found


def flops(part: Work, op: str) -> float:
    return sum(one.flops * one.calls for one in part.ops if one.op == op)


def test_nothing_is_counted_unless_asked_for():
    workload = Workload(model=nn.Linear(4, 4), batch=batch_builder(torch.zeros(2, 4)))
    device = VirtualGpu(find_gpu("t4"))
    assert device.run(workload, micro_batch=2, accumulation_steps=1).work is None


def test_a_run_that_is_counted_has_the_trace_of_one_that_is_not():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten())
    workload = Workload(model=model, batch=batch_builder(torch.zeros(2, 3, 16, 16)))
    traces = [
        VirtualGpu(find_gpu("t4"), counts_work=counts)
        .run(workload, micro_batch=4, accumulation_steps=2)
        .trace
        for counts in (False, True)
    ]
    assert traces[0] == traces[1]


def test_a_linear_layer_has_two_flops_a_weight_and_sample_in_each_of_three_products():
    found = work(nn.Linear(64, 256), torch.zeros(2, 64))
    once = 2 * N * 64 * 256
    assert flops(found.forward, "addmm") == once
    assert found.forward.flops == once
    assert found.backward.flops == once  # the input needs no gradient
    two = work(nn.Sequential(nn.Linear(64, 256), nn.Linear(256, 64)), torch.zeros(2, 64))
    assert (two.forward.flops, two.backward.flops) == (2 * once, 3 * once)


def test_a_product_reads_both_matrices_and_writes_one():
    found = work(nn.Linear(64, 256, bias=False), torch.zeros(2, 64))
    product = of(found.forward, "mm")
    assert product.bytes == 4 * (N * 64 + 64 * 256 + N * 256)
    assert product.product == (1, N, 256, 64)
    assert (product.kind, product.precision) == ("matmul", "fp32")


def test_views_cost_nothing():
    class Viewed(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(64))

        def forward(self, x):
            x = x * self.weight
            return x.view(-1, 8, 8).transpose(1, 2)[:, :4].unsqueeze(0).expand(3, -1, -1, -1)

    found = work(Viewed(), torch.zeros(2, 64))
    assert [op.op for op in found.forward.ops] == ["mul", "sum", "div"]
    # what is expanded is read once
    assert of(found.forward, "sum").bytes == 4 * (N * 32 + 1)


def test_an_op_in_place_reads_and_writes():
    found = work(nn.Sequential(nn.Linear(64, 64), nn.ReLU(inplace=True)), torch.zeros(2, 64))
    assert of(found.forward, "relu_").bytes == 2 * 4 * N * 64


@pytest.mark.parametrize("groups", [1, 4, 16])
def test_a_convolution_has_two_flops_a_weight_and_place_in_each_direction(groups):
    layers = nn.Sequential(
        nn.Conv2d(16, 16, 1, bias=False), nn.Conv2d(16, 32, 3, groups=groups, bias=False)
    )
    found = work(layers, torch.zeros(2, 16, 10, 10))
    once = 2 * N * 8 * 8 * 32 * (16 // groups) * 9
    first = 2 * N * 10 * 10 * 16 * 16
    assert flops(found.forward, "convolution") == once + first
    assert flops(found.backward, "convolution_backward_data") == once
    assert flops(found.backward, "convolution_backward_weight") == once + first
    kind = {1: "convolution", 4: "grouped_convolution", 16: "depthwise_convolution"}[groups]
    ((last,),) = ([op for op in found.forward.ops if op.flops == once],)
    assert last.kind == kind
    assert last.product == (groups, N * 64, 32 // groups, 16 // groups * 9)


def test_a_transposed_convolution_has_the_flops_of_the_one_it_inverts():
    found = work(nn.ConvTranspose2d(32, 16, 3, bias=False), torch.zeros(2, 32, 8, 8))
    assert flops(found.forward, "convolution") == 2 * N * 8 * 8 * 32 * 16 * 9


def test_convolutions_convert_in_nchw_and_not_in_nhwc():
    def conversions(layout):
        model = nn.Conv2d(16, 16, 3, padding=1, bias=False).to(memory_format=layout)
        sample = torch.zeros(2, 16, 8, 8).to(memory_format=layout)
        found = work(model, sample, autocast="bf16")
        return [op for op in found.forward.ops if op.kind == "conversion"]

    (conversion,) = conversions(torch.contiguous_format)
    assert conversion.bytes == 2 * 2 * (
        2 * N * 16 * 64
    )  # of bf16, input and output, there and back
    assert not conversions(torch.channels_last)


class Attention(nn.Module):
    def __init__(self, causal):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.causal = causal

    def forward(self, x):
        q = (x * self.scale).view(x.shape[0], -1, 4, 64).transpose(1, 2)
        return F.scaled_dot_product_attention(q, q, q, is_causal=self.causal)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("autocast", [None, "bf16"])
def test_attention_is_two_products_forward_and_five_backward(causal, autocast):
    length = 128
    found = work(Attention(causal), torch.zeros(2, length, 256), autocast=autocast)
    once = 2 * N * 4 * length * length * 64 * (0.5 if causal else 1)
    assert found.forward.flops == 2 * once
    assert found.backward.flops == 5 * once
    kinds = {op.kind for op in found.forward.ops if op.flops}
    assert kinds == {"attention"}


def test_attention_of_cudnn_is_told_apart():
    sample = torch.zeros(2, 128, 256)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):  # older cuDNNs are not PyTorch's first choice
        found = work(Attention(True), sample, gpu="h100-80gb", autocast="bf16")
    assert {op.kind for op in found.forward.ops if op.flops} == {"cudnn_attention"}


def test_autocast_computes_in_its_precision_and_moves_what_it_casts():
    found = work(nn.Linear(64, 256, bias=False), torch.zeros(2, 64), autocast="bf16")
    assert of(found.forward, "mm").precision == "bf16"
    casts = [op for op in found.forward.ops if op.op == "_to_copy"]
    sizes = sorted(op.bytes for op in casts)
    assert sizes == [6 * N * 64, 6 * 64 * 256]  # fp32 in, bf16 out


def test_products_in_fp32_follow_the_user_s_settings():
    def precisions(matmul, convolution):
        before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = matmul
        torch.backends.cudnn.allow_tf32 = convolution
        try:
            model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 8))
            ops = work(model, torch.zeros(2, 3, 8, 8)).forward.ops
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before[0]
            torch.backends.cudnn.allow_tf32 = before[1]
        return [op.precision for op in ops if op.kind in ("convolution", "matmul")]

    assert precisions(False, True) == ["tf32", "fp32"]
    assert precisions(True, False) == ["fp32", "tf32"]


def test_an_update_moves_every_state_as_its_kernel_does():
    parameters = 64 * 256
    model = nn.Linear(64, 256, bias=False)
    fused = work(
        model, torch.zeros(2, 64), optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True)
    ).update
    foreach = work(model, torch.zeros(2, 64), optimizer=torch.optim.AdamW).update
    adam = of(fused, "_fused_adamw_")
    # weight, gradient and two states are read; all but the gradient are written
    assert adam.bytes == pytest.approx(7 * 4 * parameters, rel=0.01)
    assert foreach.bytes > 2 * fused.bytes
    assert foreach.calls > fused.calls


def test_later_micro_batches_add_to_the_gradients():
    model = nn.Linear(64, 256, bias=False)
    found = work(model, torch.zeros(2, 64), steps=3)
    assert found.later_forward.flops == found.forward.flops
    added = found.later_backward.bytes - found.backward.bytes
    assert added == 3 * 4 * 64 * 256
    assert work(model, torch.zeros(2, 64)).later_backward is None


def test_checkpointing_counts_what_is_computed_again():
    class Checkpointed(nn.Module):
        def __init__(self, on):
            super().__init__()
            self.on = on
            self.layers = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))

        def forward(self, x):
            return checkpoint(self.layers, x, use_reentrant=False) if self.on else self.layers(x)

    plain, again = (work(Checkpointed(on), torch.zeros(2, 64)) for on in (False, True))
    assert again.forward.flops == plain.forward.flops
    assert again.backward.flops >= plain.backward.flops + plain.forward.flops / 2


def test_a_step_of_a_gpt2_has_six_flops_a_parameter_and_token_and_attention():
    transformers = pytest.importorskip("transformers")
    length, width, layers, vocabulary = 64, 128, 2, 512
    config = transformers.GPT2Config(
        n_positions=length,
        n_embd=width,
        n_layer=layers,
        n_head=2,
        vocab_size=vocabulary,
        attn_implementation="sdpa",
    )
    model = transformers.GPT2LMHeadModel(config)
    tokens = torch.zeros(2, length, dtype=torch.int64)
    found = work(
        model,
        {"input_ids": tokens, "labels": tokens},
        loss=lambda model, batch: model(**batch).loss,
        autocast="bf16",
    )
    weights = layers * 12 * width**2 + vocabulary * width
    products = 2 * N * length * weights
    attention = layers * 2 * N * length**2 * width  # causal: half of two products of 2 FLOPs
    assert found.forward.flops == pytest.approx(products + attention)
    assert found.backward.flops == pytest.approx(2 * products + 2.5 * attention)


def test_an_embedding_reads_the_rows_that_it_gives():
    class Embedded(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(10_000, 64)

        def forward(self, x):
            return self.table(x)

    found = work(Embedded(), torch.zeros(2, 16, dtype=torch.int64))
    assert of(found.forward, "embedding").bytes == N * 16 * (8 + 2 * 4 * 64)
    assert of(found.backward, "embedding_dense_backward").bytes > 10_000 * 64 * 4


def test_recurrent_layers_multiply_every_weight_with_every_step():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.LSTM(32, 64, num_layers=2, batch_first=True)

        def forward(self, x):
            return self.rnn(x)[0]

    found = work(Recurrent(), torch.zeros(2, 10, 32))
    weights = 4 * 64 * (32 + 64) + 4 * 64 * (64 + 64)
    assert flops(found.forward, "_cudnn_rnn") == 2 * weights * N * 10
    assert flops(found.backward, "_cudnn_rnn_backward") == 4 * weights * N * 10


def test_ranks_with_whole_copies_average_their_gradients_once_a_window():
    model = nn.Linear(64, 256)
    found = work(model, torch.zeros(2, 64), world_size=4, steps=2)
    (average,) = found.averages
    assert average.collective == "all_reduce"
    assert average.bytes == sum(p.nbytes for p in model.parameters())
    assert average.ranks == 4
    assert not work(model, torch.zeros(2, 64)).averages


def test_ranks_that_share_parameters_gather_them_and_scatter_gradients():
    model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64, bias=False)) for _ in range(3)))
    found = work(model, torch.zeros(2, 64), world_size=4, sharding="fsdp")
    whole = 3 * 64 * 64 * 4
    forward = [one for one in found.forward.communication if one.collective == "all_gather"]
    assert sum(one.bytes for one in forward) == whole
    assert {one.ranks for one in forward} == {4}
    assert all(one.overlaps for one in forward)
    scattered = [one for one in found.backward.communication if one.collective == "reduce_scatter"]
    assert sum(one.bytes for one in scattered) == whole


def test_what_is_remembered_of_calls_is_what_they_cost(monkeypatch):
    def found():
        model = nn.Sequential(*[nn.Linear(32, 32) for _ in range(4)], nn.LayerNorm(32))
        return work(model, torch.zeros(2, 32), steps=2, autocast="bf16")

    remembered = found()
    count = WorkCounter.count
    monkeypatch.setattr(WorkCounter, "count", lambda self, *call: count(self, *call[:-1], None))
    assert found() == remembered


def test_windows_before_the_last_are_not_counted():
    workload = Workload(model=nn.Linear(8, 8), batch=batch_builder(torch.zeros(2, 8)))
    device = VirtualGpu(find_gpu("t4"), counts_work=True)
    works = [
        device.run(workload, micro_batch=2, accumulation_steps=2, windows=windows).work
        for windows in (2, 3)
    ]
    assert (
        works[0]
        == works[1]
        != device.run(workload, micro_batch=2, accumulation_steps=2, windows=1).work
    )
