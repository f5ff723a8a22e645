"""The user's code runs unmodified on a GPU that is not there, and the arithmetic comes out."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from autobatch.devices.virtual.gpu import VirtualGpu
from autobatch.errors import UsageError, WorkloadError
from autobatch.gpus.catalogue import find_gpu
from autobatch.memory.trace import Trace
from autobatch.workload.sample import batch_builder
from autobatch.workload.workload import Workload

WIDTH = 64


def mlp(depth: int = 1) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(WIDTH, 256), nn.GELU(), nn.Linear(256, WIDTH)]
    return nn.Sequential(*layers)


def run(
    model: nn.Module, *, gpu: str = "a100-40gb", steps: int = 1, n: int = 8, **options
) -> Trace:
    sample = options.pop("sample", torch.zeros(2, WIDTH))
    workload = Workload(model=model, batch=batch_builder(sample), **options)
    device = VirtualGpu(find_gpu(gpu))
    return device.run(workload, micro_batch=n, accumulation_steps=steps).trace


def total(trace: Trace, category: str, *, phase: str | None = None) -> int:
    return sum(
        b.size_bytes for b in trace.blocks if b.category == category and phase in (None, b.phase)
    )


def ops(trace: Trace) -> set[str]:
    return {block.op for block in trace.blocks}


def nbytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def largest(trace: Trace, category: str) -> int:
    """Most bytes of a category alive at once."""
    live = most = 0
    for event in trace.events:
        block = trace.blocks[event if event >= 0 else ~event]
        if block.category == category:
            live += block.size_bytes if event >= 0 else -block.size_bytes
            most = max(most, live)
    return most


def test_parameters_gradients_and_adam_state_are_one_one_and_two_times_the_weights():
    model = mlp()
    trace = run(model)
    assert largest(trace, "parameters") == nbytes(model)
    assert largest(trace, "gradients") == nbytes(model)
    assert largest(trace, "optimizer_state") == 2 * nbytes(model)


def test_tied_weights_are_counted_once():
    tied = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))
    tied[1].weight = tied[0].weight
    assert largest(run(tied), "parameters") == nbytes(tied)


def test_frozen_weights_have_no_gradients_and_no_optimizer_state():
    model = mlp()
    model[0].requires_grad_(False)
    trace = run(model)
    assert largest(trace, "gradients") == nbytes(model[2])
    assert largest(trace, "optimizer_state") == 2 * nbytes(model[2])


def test_gradients_wait_in_memory_only_when_accumulating():
    def live_gradients_when_forward_ends(trace: Trace) -> int:
        backward = [mark for mark in trace.marks if mark.phase == "backward"][-1]
        return trace.by_category(backward.event - 1)["gradients"]

    model = mlp()
    assert live_gradients_when_forward_ends(run(model, steps=1)) == 0
    assert live_gradients_when_forward_ends(run(model, steps=2)) == nbytes(model)


@pytest.mark.parametrize(
    ("make", "state", "temporaries"),
    [
        (partial(torch.optim.SGD, lr=0.1), 0, 0),
        (partial(torch.optim.SGD, lr=0.1, momentum=0.9), 1, 0),
        (torch.optim.AdamW, 2, 1),
        (partial(torch.optim.AdamW, fused=True), 2, 0),
        (torch.optim.RMSprop, 1, 1),
        (torch.optim.Adagrad, 1, 2),
    ],
)
def test_an_optimizer_takes_the_state_and_temporaries_of_its_cuda_default(make, state, temporaries):
    model = nn.Linear(WIDTH, 1024, bias=False)
    trace = run(model, optimizer=make)
    # the fused form keeps its step counter on the GPU
    assert largest(trace, "optimizer_state") - state * nbytes(model) in (0, 4)
    steps = [mark.event for mark in trace.marks if mark.phase == "step"]
    peak = max(trace.by_category(e)["temporaries"] for e in range(steps[-1], len(trace.events)))
    before = trace.by_category(steps[-1] - 1)["temporaries"]
    assert round((peak - before) / nbytes(model)) == temporaries


def test_bf16_autocast_casts_weights_once_per_micro_batch_and_keeps_gradients_in_fp32():
    model = mlp(depth=3)
    trace = run(model, autocast="bf16", steps=2)
    casts = [b for b in trace.blocks if b.op == "aten::_to_copy" and b.phase == "forward"]
    weights = list(model.parameters())
    # 2 windows of 2 micro-batches: every weight once each, and the input
    assert len(casts) == 4 * (len(weights) + 1)
    assert largest(trace, "gradients") == nbytes(model)


def test_autocast_follows_cudas_policy():
    seen: dict[str, torch.dtype] = {}

    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        hidden = model(batch)
        seen["linear"] = hidden.dtype
        seen["softmax"] = hidden.softmax(-1).dtype
        seen["sum"] = hidden.sum().dtype
        seen["layer_norm"] = F.layer_norm(hidden, (WIDTH,)).dtype
        seen["gelu"] = F.gelu(hidden).dtype
        seen["bmm"] = torch.bmm(hidden[None], hidden.t()[None]).dtype
        seen["add"] = (hidden + batch).dtype
        seen["addcmul"] = torch.addcmul(hidden, hidden, batch).dtype
        seen["pow"] = hidden.pow(2).dtype
        return hidden.float().pow(2).mean()

    run(mlp(), loss=loss, autocast="bf16")
    half, full = torch.bfloat16, torch.float32
    assert seen == {
        "linear": half,
        "softmax": full,
        "sum": full,
        "layer_norm": full,
        "gelu": half,
        "bmm": half,
        "add": full,
        "addcmul": full,
        "pow": full,
    }


def test_fp16_runs_through_a_grad_scaler_and_clipping():
    trace = run(mlp(), autocast="fp16", clip_norm=1.0)
    assert "aten::_foreach_norm.Scalar" in ops(trace)
    assert largest(trace, "optimizer_state") == 2 * nbytes(mlp())


class Blocks(nn.Module):
    def __init__(self, reentrant: bool | None):
        super().__init__()
        self.blocks = nn.ModuleList(mlp() for _ in range(6))
        self.reentrant = reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            if self.reentrant is None:
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.reentrant)
        return x


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_keeps_one_block_of_activations(reentrant):
    sample = torch.zeros(2, WIDTH, requires_grad=reentrant)
    plain = largest(run(Blocks(None), n=512), "activations")
    saved = largest(run(Blocks(reentrant), n=512, sample=sample), "activations")
    assert saved < plain / 2


class SaysCuda(nn.Module):
    """Code that was written for one GPU and says so everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert torch.cuda.is_available()
        x = x.cuda()
        assert x.is_cuda
        noise = torch.randn(x.shape, device="cuda")
        zeros = torch.zeros(3, device=torch.device("cuda:0"))
        moved = torch.ones(3).to("cuda", non_blocking=True)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            hidden = self.linear(x)
            assert hidden.dtype is torch.bfloat16
            with torch.autocast("cuda", enabled=False):
                hidden = self.linear(x.float())
                assert hidden.dtype is torch.float32
        torch.cuda.synchronize()
        return hidden + noise + zeros.sum() + moved.sum()


def test_literal_cuda_lands_on_the_virtual_device():
    run(SaysCuda())
    if not torch.cuda.is_initialized():
        assert not torch.accelerator.is_available()


def test_values_read_from_the_device_take_the_documented_stand_ins():
    seen = []

    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        value = model(batch).square().mean()
        if torch.isnan(value) or not torch.isfinite(value) or torch.isinf(batch).any():
            raise FloatingPointError("stand-ins must not look like a failure")
        seen.extend([value.item(), int((batch > 0).sum()), bool((batch == batch).all())])
        return value

    run(mlp(), loss=loss)
    assert seen[:3] == [0.6, 1, True]


def test_shapes_that_depend_on_values_take_their_upper_bound_and_say_so():
    shapes = []

    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        output = model(batch)
        picked = output[output > 0.5]
        shapes.extend([picked.shape, torch.nonzero(batch).shape, torch.unique(batch).shape])
        return picked.sum() + output.masked_select(batch > 0).sum()

    workload = Workload(model=mlp(), batch=batch_builder(torch.zeros(2, WIDTH)), loss=loss)
    ran = VirtualGpu(find_gpu("t4")).run(workload, micro_batch=4, accumulation_steps=1)
    assert shapes[:3] == [(4 * WIDTH,), (4 * WIDTH, 2), (4 * WIDTH,)]
    assert "upper bound" in ran.notes[0]
    assert "nonzero" in ran.notes[0]


class Attention(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).unbind(2)
        return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)))

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)


@pytest.mark.parametrize(
    ("gpu", "autocast", "kernel"),
    [
        ("a100-40gb", "bf16", "flash"),
        ("a100-40gb", None, "efficient"),
        ("h100-80gb", "bf16", "cudnn"),
        ("t4", "fp16", "efficient"),
    ],
)
def test_attention_takes_the_kernel_of_the_target_gpu(gpu, autocast, kernel, monkeypatch):
    monkeypatch.setattr("autobatch.devices.virtual.kernels.attention._cudnn_version", lambda: 92000)
    trace = run(Attention(), gpu=gpu, autocast=autocast, sample=torch.zeros(2, 32, WIDTH))
    assert any(f"_scaled_dot_product_{kernel}_attention" in op for op in ops(trace))


@pytest.mark.parametrize(("gpu", "megabytes"), [("a100-40gb", 8.125), ("h100-80gb", 32)])
def test_cublas_keeps_a_workspace_for_forward_and_one_for_backward(gpu, megabytes):
    trace = run(mlp(), gpu=gpu)
    sizes = [block.size_bytes for block in trace.blocks if block.category == "workspace"]
    assert sizes == [int(megabytes * 2**20)] * 2


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], **options):
        super().__init__()
        self.rnn = kind(WIDTH, 32, num_layers=2, **options)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.rnn(x)[0]


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_run_as_one_cudnn_op(kind):
    trace = run(Recurrent(kind, bidirectional=True), sample=torch.zeros(2, 20, WIDTH))
    assert "aten::_cudnn_rnn" in ops(trace)
    assert not any("cell" in op for op in ops(trace))


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(WIDTH, 32, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        lengths = torch.full((x.size(0),), x.size(1))
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, True, enforce_sorted=False)
        padded, _ = nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0], batch_first=True)
        assert padded.shape == (x.size(0), x.size(1), 32)
        return padded


def test_packed_sequences_count_as_full_length():
    assert "aten::_cudnn_rnn" in ops(run(Packed(), sample=torch.zeros(2, 20, WIDTH)))


def test_a_loss_may_hold_tensors_of_its_own():
    weights = torch.rand(WIDTH)

    def closure(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        labels = torch.zeros(batch.size(0), dtype=torch.int64, device=batch.device)
        return F.cross_entropy(model(batch), labels, weight=weights)

    assert largest(run(mlp(), loss=closure), "parameters") == nbytes(mlp())


def test_a_compiled_model_is_simulated_through_its_eager_original():
    model = torch.compile(mlp())
    workload = Workload(model=model, batch=batch_builder(torch.zeros(2, WIDTH)))
    ran = VirtualGpu(find_gpu("t4")).run(workload, micro_batch=4, accumulation_steps=1)
    assert "eager original" in ran.notes[0]
    assert largest(ran.trace, "parameters") == nbytes(mlp())


def test_gradients_of_gradients_run():
    def penalty(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        batch = batch.detach().requires_grad_()
        value = model(batch).sum()
        (gradient,) = torch.autograd.grad(value, batch, create_graph=True)
        return value + gradient.square().sum()

    assert largest(run(mlp(), loss=penalty), "gradients") == nbytes(mlp())


def test_the_evaluation_step_runs_without_gradients_in_eval_mode():
    modes = []

    def evaluate(model: nn.Module, batch: torch.Tensor) -> None:
        modes.append((model.training, model(batch).requires_grad))

    trace = run(mlp(), evaluate=evaluate)
    assert modes == [(False, False)]
    assert trace.marks[-1].phase == "evaluate"


def test_inputs_have_a_category_and_follow_the_micro_batch():
    assert largest(run(mlp(), n=16), "inputs") == 2 * 16 * WIDTH * 4  # the old and the new batch


def test_a_model_of_70_billion_parameters_needs_no_memory():
    with torch.device("meta"):
        layers = [nn.Linear(32_768, 32_768, bias=False) for _ in range(65)]
        model = nn.Sequential(*layers)
    trace = run(model, sample=torch.zeros(1, 32_768), n=2)
    assert largest(trace, "parameters") == 65 * 2**30 * 4


def test_the_same_run_twice_gives_the_same_trace():
    assert run(Blocks(False)) == run(Blocks(False))


def test_an_error_in_the_users_model_keeps_its_traceback():
    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        raise KeyError("labels")

    with pytest.raises(WorkloadError, match="failed at micro-batch 8: KeyError") as failure:
        run(mlp(), loss=loss)
    assert isinstance(failure.value.__cause__, KeyError)


def test_an_error_in_backward_keeps_its_traceback_too():
    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        output = model(batch)
        output.register_hook(lambda gradient: 1 / 0)
        return output.sum()

    with pytest.raises(WorkloadError, match="ZeroDivisionError") as failure:
        run(mlp(), loss=loss)
    assert isinstance(failure.value.__cause__, ZeroDivisionError)


def test_an_optimizer_that_already_has_state_is_simulated_and_left_alone():
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(2, WIDTH)).sum().backward()
    optimizer.step()
    before = {k: v.clone() for k, v in optimizer.state[model[0].weight].items()}
    trace = run(model, optimizer=optimizer)
    assert largest(trace, "optimizer_state") == 2 * nbytes(model)
    after = optimizer.state[model[0].weight]
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_nothing_of_the_simulation_stays_behind():
    set_autocast = torch.set_autocast_enabled
    is_available = torch.cuda.is_available
    run(mlp(), autocast="bf16")
    assert torch.set_autocast_enabled is set_autocast
    assert torch.cuda.is_available is is_available
    assert type(torch.empty(1)) is torch.Tensor
    assert torch.accelerator.is_available() == torch.cuda.is_available()


def test_multi_head_attention_reaches_the_fused_kernel():
    layer = nn.TransformerEncoderLayer(WIDTH, 4, batch_first=True)
    trace = run(layer, autocast="bf16", sample=torch.zeros(2, 32, WIDTH))
    assert any("_scaled_dot_product_flash_attention" in op for op in ops(trace))


class CheckpointedAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()

    def noisy(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x + torch.randn(x.shape, device="cuda"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.noisy, x, use_reentrant=False)


def test_a_recomputed_forward_pass_takes_the_same_kernels():
    trace = run(CheckpointedAttention(), autocast="bf16", sample=torch.zeros(2, 32, WIDTH))
    flash = [b for b in trace.blocks if "_flash_attention" in b.op and b.phase == "backward"]
    assert any(block.op == "aten::_scaled_dot_product_flash_attention" for block in flash)


def test_modules_in_a_loss_closure_are_neither_moved_nor_changed():
    teacher = mlp()

    def distil(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        teacher.to(batch.device).eval()
        return F.mse_loss(model(batch), teacher(batch).detach())

    before = [p.clone() for p in teacher.parameters()]
    run(mlp(), loss=distil)
    assert teacher.training
    assert all(type(p) is nn.Parameter for p in teacher.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, teacher.parameters(), strict=True))


def test_a_loss_can_be_logged_in_the_usual_ways():
    lines = []

    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        value = model(batch).mean()
        lines.append(f"{value.detach():.3f} {value.detach().cpu().numpy()} {value.tolist()}")
        return value

    run(mlp(), loss=loss)
    assert lines[0] == "0.600 0.6000000238418579 0.6"


def test_an_endless_loop_over_values_ends_in_a_clear_error():
    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        value = model(batch).mean()
        while value > 0.1:
            pass
        return value

    with pytest.raises(WorkloadError, match="asked 10,000 times"):
        run(mlp(), loss=loss)


def test_an_optimizer_of_another_model_is_refused():
    with pytest.raises(WorkloadError, match="none of the model's parameters"):
        run(mlp(), optimizer=torch.optim.SGD(mlp().parameters(), lr=0.1))


def test_an_op_without_a_shape_rule_is_run_on_zeros_on_the_cpu():
    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        labels = torch.zeros(batch.size(0), dtype=torch.int64, device=batch.device)
        return F.multi_margin_loss(model(batch), labels)

    assert "aten::multi_margin_loss" in ops(run(mlp(), loss=loss))


def test_sparse_gradients_are_refused_by_name():
    model = nn.Embedding(10, WIDTH, sparse=True)
    with pytest.raises(WorkloadError, match="sparse=False"):
        run(model, sample=torch.zeros(2, 4, dtype=torch.int64))


def test_the_settings_of_the_allocator_that_the_run_would_have_are_obeyed(monkeypatch):
    model, sample = nn.Linear(1024, 1024), torch.zeros(2, 1024)
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    workload = Workload(model=model, batch=batch_builder(sample), optimizer=torch.optim.SGD)

    def reserved():
        device = VirtualGpu(find_gpu("t4"))
        return device.run(workload, micro_batch=2, accumulation_steps=1).replay.peak_reserved_bytes

    usual = reserved()
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "large_segment_size_mb:10")
    assert reserved() < usual
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:maybe")
    with pytest.raises(UsageError, match="expandable_segments:maybe"):
        reserved()


class FromNumbers(nn.Module):
    """Reads back, on the GPU, what follows from numbers in its own code."""

    def __init__(self):
        super().__init__()
        self.layer, self.read = nn.Linear(WIDTH, WIDTH), []

    def forward(self, x):
        sides = torch.as_tensor([(4, 5), (2, 3)], device=x.device)
        areas = sides.prod(1)
        self.read += [int(areas.sum()), bool((sides[:, 0] * sides[:, 1] != areas).any())]
        self.read += [int(side) for row in sides for side in row]
        areas[0] = 7
        self.read.append(int(areas[0]))
        return self.layer(x)


def test_numbers_of_the_users_code_are_read_back_as_they_are(capsys):
    def loss(model, batch):
        value = model(batch).sum()
        print(model.read)
        return value

    run(FromNumbers(), loss=loss)
    first = capsys.readouterr().out.splitlines()[0]
    assert first == "[26, False, 4, 5, 2, 3, 7]"


class Patches(nn.Module):
    """Takes from its inputs how many rows belong to each image, as vision towers do."""

    def __init__(self):
        super().__init__()
        self.layer, self.seen = nn.Linear(WIDTH, WIDTH), []
        self.register_buffer("merge", torch.tensor(2))

    def forward(self, rows, grid, ids):
        sides = grid // self.merge
        counts = grid.prod(1)
        ends = F.pad(counts.cumsum(0), (1, 0))
        parts = rows.flatten(0, 1).split(counts.tolist())
        starts = torch.repeat_interleave(ends[:-1], counts)
        within = torch.arange(counts.sum(), device=rows.device) - starts
        first = starts[within == 0]
        self.seen.append([sides[-1].tolist(), parts[0].shape[0], first.shape[0], ids[0, 0].item()])
        self.merge.add_(1)
        grid.zero_()
        return self.layer(torch.cat(parts))


PATCHES = {
    "rows": torch.zeros(2, 24, WIDTH),
    "grid": torch.tensor([[4, 6], [4, 6]]),
    "ids": torch.full((2, 128), 5),
}


@pytest.mark.parametrize("n", [2, 3, 500])
def test_small_whole_numbers_of_the_sample_are_read_back_as_they_are(n, capsys):
    def loss(model, batch):
        value = model(**batch).sum()
        print(model.seen)
        return value

    model = Patches()
    run(model, n=n, sample=PATCHES, loss=loss)
    # the grid, merged by twos, then threes, and one row a sample; token ids are not known
    seen = f"[[[2, 3], 24, {n}, 1], [[1, 2], 24, {n}, 1]]"
    assert capsys.readouterr().out.splitlines()[-1] == seen
    assert PATCHES["grid"].tolist() == [[4, 6], [4, 6]]
    assert model.merge == 2


def test_shapes_that_follow_values_of_the_sample_say_so():
    workload = Workload(model=Patches(), batch=batch_builder(PATCHES))
    ran = VirtualGpu(find_gpu("t4")).run(workload, micro_batch=2, accumulation_steps=1)
    assert "(index, repeat_interleave) followed those of the sample" in ran.notes[-1]


def test_values_that_are_written_over_with_unknown_ones_are_unknown_in_every_view():
    seen = []

    def loss(model, batch):
        output = model(batch)
        known = torch.tensor([3, 4, 5], device=output.device)
        last = known[1:]
        known[2] = output.argmax()
        seen.append(last.tolist())
        known.fill_(7)
        seen.append(last.tolist())
        return output.sum()

    run(mlp(), loss=loss)
    assert seen[:2] == [[1, 1], [1, 1]]


def test_a_sample_without_values_has_none():
    seen = []

    def loss(model, batch):
        seen.append(batch[1].tolist())
        return model(batch[0]).sum()

    sample = torch.zeros(2, WIDTH), torch.empty(2, 2, dtype=torch.int64, device="meta")
    run(mlp(), loss=loss, sample=sample, n=2)
    assert seen[0] == [[1, 1], [1, 1]]


def test_lists_of_sizes_that_are_filled_one_by_one_are_known():
    seen = []

    def loss(model, batch):
        shapes = torch.empty(2, 2, dtype=torch.int64, device=batch.device)
        for level, side in enumerate((8, 4)):
            shapes[level, 0], shapes[level, 1] = side, side
        seen.append(bool((shapes[:, 0] * shapes[:, 1]).sum() == 80))
        half = torch.ceil(shapes.float() / 3).long()
        seen.append(half.tolist())
        return model(batch).sum()

    run(mlp(), loss=loss)
    assert seen[:2] == [True, [[3, 3], [2, 2]]]


class Experts(nn.Module):
    """Sorts rows by expert, and parts them by counts that it reads back."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(WIDTH, 3)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))

    def forward(self, x):
        chosen = self.router(x).argmax(-1)
        counts = F.one_hot(chosen, 3).sum(0).tolist()
        parts = x[chosen.argsort()].split(counts)
        return torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True)])


def test_parts_of_unknown_sizes_are_taken_to_be_equal_and_it_is_said():
    workload = Workload(model=Experts(), batch=batch_builder(torch.zeros(2, WIDTH)))
    ran = VirtualGpu(find_gpu("t4")).run(workload, micro_batch=8, accumulation_steps=1)
    assert "taken to be equal" in " ".join(ran.notes)
    written = [
        b.size_bytes for b in ran.trace.blocks if b.op == "aten::mm" and b.phase == "forward"
    ]
    assert written[:3] == [rows * WIDTH * 4 for rows in (3, 3, 2)]


def test_a_mask_that_rows_are_written_by_has_as_many_in_its_gradient():
    def loss(model, batch):
        output, rows = model(batch), model(batch[:3])
        output = output.clone()
        output[batch[:, 0] > 0] = rows
        return output.sum()

    assert run(mlp(), loss=loss)


def test_numbers_on_the_gpu_can_be_made_a_tensor_again():
    seen = []

    def loss(model, batch):
        output = model(batch)
        sides = torch.tensor([4, 5], device=output.device)
        seen.append(torch.tensor([0, sides[0], 2 * sides[1]], device="cuda").tolist())
        seen.append(torch.tensor([3, output.argmax()]).tolist())
        return output.sum()

    run(mlp(), loss=loss)
    assert seen[:2] == [[0, 4, 10], [1, 1]]


def test_the_additive_form_of_a_mask_of_ones_hides_nothing_and_marks_nothing():
    seen = []

    def loss(model, batch):
        output = model(batch)
        mask = torch.ones(len(batch), 3000, dtype=torch.int64, device=batch.device)
        hidden = 1.0 - mask[:, None, :].float()
        hidden = hidden.masked_fill(hidden.bool(), torch.finfo(torch.float32).min)
        seen.extend([bool((hidden > 0).any()), bool((hidden < 0).any())])
        seen.append(torch.div(7, 2, rounding_mode="trunc").item())
        return output.sum()

    run(mlp(), loss=loss)
    assert seen[:3] == [False, False, 3]
