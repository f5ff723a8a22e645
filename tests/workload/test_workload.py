"""The training window itself: what runs, in which order, and what it refuses."""

import subprocess
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autobatch import UsageError, Workload, WorkloadError, tune
from autobatch.advice.loop import training_loop
from autobatch.devices.cuda.gpu import CudaGpu
from autobatch.devices.virtual.gpu import VirtualGpu
from autobatch.gpus.catalogue import find_gpu
from autobatch.workload.loss import DefaultLoss
from autobatch.workload.sample import batch_builder
from autobatch.workload.wrappers import is_compiled, unwrapped
from tests.support.cuda_on_cpu import CudaOnCpu
from tests.support.seen import Seen

WIDTH = 256
DEVICES = {"simulated": lambda: VirtualGpu(find_gpu("t4")), "played": CudaOnCpu}


class Parallel(nn.Module):
    """Has the attributes by which a DistributedDataParallel is known."""

    def __init__(self, module, gradient_as_bucket_view=False):
        super().__init__()
        self.module = module
        self.gradient_as_bucket_view = gradient_as_bucket_view

    def forward(self, *inputs):
        return self.module(*inputs)


class AverageOfWeights:
    """A window as users write them, with an average of the weights that it keeps itself."""

    def __init__(self):
        self.average = None

    def __call__(self, model, optimizer, batches):
        for batch in batches:
            (model(batch).square().mean() / 2).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if self.average is None:
            self.average = [p.detach().clone() for p in model.parameters()]
        for kept, parameter in zip(self.average, model.parameters(), strict=True):
            kept.lerp_(parameter.detach(), 0.1)


def workload(**options):
    given = {"model": nn.Linear(WIDTH, WIDTH), "batch": batch_builder(torch.ones(2, WIDTH))}
    return Workload(**given | options)


def run(kind, job, n=8, steps=2):
    device = DEVICES[kind]()
    if kind == "played":
        device = CudaGpu(device)
    with device.hosting(job):
        return device.run(job, micro_batch=n, accumulation_steps=steps)


def test_a_criterion_is_a_loss_of_the_outputs_and_labels():
    batch = batch_builder((torch.ones(2, WIDTH), torch.zeros(2, dtype=torch.long)))
    held = []

    def loss(model, batch):  # as a loop's variable holds them
        held[:] = [model(batch[0])]
        return F.cross_entropy(held[0], batch[1])

    by_hand = workload(batch=batch, loss=loss)
    criterion = workload(batch=batch, loss=nn.CrossEntropyLoss())
    found = [run("simulated", each).replay for each in (criterion, by_hand)]
    assert found[0] == found[1]


@pytest.mark.parametrize("kind", DEVICES)
def test_a_window_of_the_users_own_runs_in_place_of_the_usual_one(kind):
    window = AverageOfWeights()
    result = run(kind, workload(window=window))
    assert result.loss == "window function"
    assert window.average is None  # a copy ran
    phases = [(m.phase, m.window, m.micro_batch) for m in result.trace.marks if m.phase != "setup"]
    one = [("inputs", 0), ("forward", 0), ("backward", 0)]
    one += [("inputs", 1), ("forward", 1), ("backward", 1), ("step", 1)]
    assert phases == [(p, w, m) for w in (0, 1) for p, m in one]


def test_what_the_window_keeps_is_in_the_account():
    usual, averaged = (
        run("simulated", workload(window=window)).replay.peak_allocated_bytes
        for window in (None, AverageOfWeights())
    )
    assert averaged - usual == pytest.approx(WIDTH * WIDTH * 4 + WIDTH * 4, abs=16_384)


@pytest.mark.parametrize("kind", DEVICES)
def test_a_window_that_leaves_micro_batches_out_is_refused(kind):
    def lazy(model, optimizer, batches):
        model(next(batches)).sum().backward()
        optimizer.step()

    with pytest.raises(WorkloadError, match="took 1 of 2 micro-batches"):
        run(kind, workload(window=lazy))


@pytest.mark.parametrize("kind", DEVICES)
def test_a_second_pass_over_the_micro_batches_is_refused_and_a_list_of_them_is_not(kind):
    passes = Seen()

    def twice(model, optimizer, batches):
        for _ in range(2):  # as sharpness-aware steps do
            for batch in batches:
                model(batch).sum().backward()
                passes.append(1)
        optimizer.step()
        optimizer.zero_grad()

    with pytest.raises(WorkloadError, match=r"batches = list\(batches\)"):
        run(kind, workload(window=twice))
    passes.clear()
    run(kind, workload(window=lambda model, optimizer, b: twice(model, optimizer, list(b))))
    assert passes and len(passes) % (2 * 2) == 0


class Speaker(nn.Module):
    """Returns what language models return: a loss, and logits larger than all the rest."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(WIDTH, 100 * WIDTH)

    def forward(self, inputs):
        logits = self.head(inputs)
        return SimpleNamespace(loss=logits.logsumexp(1).mean(), logits=logits)


@dataclass
class Prediction:
    mean: Tensor
    kind: str = "normal"


class Predictor(nn.Linear):
    def forward(self, inputs):
        return {"first": Prediction(super().forward(inputs))}


def test_the_surrogate_sum_is_over_tensors_in_any_container():
    model, loss = Predictor(3, 2), DefaultLoss()
    value = loss(model, torch.ones(4, 3))
    assert loss.kind == "surrogate sum"
    assert torch.equal(value, F.linear(torch.ones(4, 3), model.weight, model.bias).sum())


def test_an_output_lives_until_the_next_one_as_in_loops_that_name_it():
    def own(model, batch):
        return model(batch).loss

    def most_logits(loss):
        trace = run("simulated", workload(model=Speaker(), loss=loss)).trace
        alive = [
            sum(e >= 0 or -1 for e in trace.events[: end + 1] if trace.blocks[max(e, ~e)].op == op)
            for end in range(len(trace.events))
        ]
        return max(alive)

    op = "aten::addmm"
    assert (most_logits(None), most_logits(own)) == (2, 1)


def test_an_optimizer_that_never_steps_is_reported():
    def stuck(model, optimizer, batches):
        for batch in batches:
            model(batch).sum().backward()
        optimizer.zero_grad()

    warnings = " ".join(run("played", workload(window=stuck)).notes)
    assert "AdamW never made a step" in warnings


@pytest.mark.parametrize(
    "extra", [{"autocast": "bf16"}, {"clip_norm": 1.0}, {"loss": lambda model, batch: None}]
)
def test_a_window_of_ones_own_leaves_no_room_for_options_of_the_usual_one(extra):
    with pytest.raises(UsageError, match="leave out loss, autocast and clip_norm"):
        workload(window=AverageOfWeights(), **extra)


def test_gradient_buckets_of_data_parallelism_are_in_the_account():
    plain, parallel, viewed = (
        run("simulated", workload(model=model)).trace
        for model in (
            nn.Linear(WIDTH, WIDTH),
            Parallel(nn.Linear(WIDTH, WIDTH)),
            Parallel(nn.Linear(WIDTH, WIDTH), gradient_as_bucket_view=True),
        )
    )
    gradients = (WIDTH * WIDTH + WIDTH) * 4
    extra = sum(b.size_bytes for b in parallel.blocks) - sum(b.size_bytes for b in plain.blocks)
    assert extra == gradients
    # gradients that live in the buckets leave these on the card, too
    assert sum(b.size_bytes for b in viewed.blocks) == sum(b.size_bytes for b in parallel.blocks)


def test_buckets_are_closed_at_25_mib():
    deep = nn.Sequential(*[nn.Linear(1024, 1024, bias=False) for _ in range(10)])  # of 4 MiB
    job = workload(model=Parallel(deep), batch=batch_builder(torch.ones(2, 1024)))
    trace = run("simulated", job).trace
    buckets = [b.size_bytes >> 20 for b in trace.blocks if b.phase == "setup"][10:]
    assert buckets == [28, 12]


def test_wrappers_are_taken_off_in_any_order():
    net = nn.Linear(2, 2)
    compiled = [torch.compile(Parallel(net)), Parallel(torch.compile(net))]
    plain = [Parallel(net), nn.DataParallel(net), net]
    assert [unwrapped(model) for model in compiled + plain] == [net] * 5
    assert [is_compiled(model) for model in compiled + plain] == [True] * 2 + [False] * 3


@pytest.mark.slow
def test_a_process_that_has_trained_before_can_simulate():
    """The autograd engine makes its threads once, at the first backward."""
    code = (
        "import torch, autobatch; m = torch.nn.Linear(4, 4);"
        "m(torch.ones(2, 4)).sum().backward();"
        "print(autobatch.tune(m, target=8, gpu='t4', sample=torch.ones(2, 4)).micro_batch)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "8", done.stderr


def test_the_surrogate_of_a_loss_is_known_by_its_kind():
    assert run("played", workload()).loss == "surrogate sum"
    named = run("played", workload(loss=lambda m, b: F.mse_loss(m(b), b), loss_name="mse"))
    assert named.loss == "mse"


class PerSample(nn.Linear):
    """Returns one loss a sample, as some audio codecs do."""

    def forward(self, x):
        return SimpleNamespace(loss=super().forward(x).square().mean(-1))


def test_a_loss_of_one_value_a_sample_is_averaged_and_that_is_said():
    job = workload(model=PerSample(WIDTH, WIDTH))
    assert run("played", job).loss == "mean of output.loss"
    plan = tune(job, target=8, gpu="t4")
    assert any("their mean was taken" in note for note in plan.notes)
    assert "model(batch).loss.mean()" in training_loop(plan)
