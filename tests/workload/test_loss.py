from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import autobatch
from autobatch.errors import WorkloadError
from autobatch.workload.loss import Criterion, DefaultLoss, as_loss

CARD = autobatch.GpuSpec(name="card", capacity_bytes=2**30)
PAIR = (torch.randn(4, 3, 4, 4), torch.randint(10, (4,)))


def classifier():
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 10))


def of_model_and_batch(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


class Weighted(nn.Module):
    def forward(self, model, batch):
        return of_model_and_batch(model, batch)


class Dice(nn.Module):
    def forward(self, a, b):
        return (a.softmax(1).amax(1) - b).abs().mean()


@pytest.mark.parametrize("given", [nn.CrossEntropyLoss(), F.cross_entropy, Dice(), nn.L1Loss()])
def test_a_criterion_of_outputs_and_labels_is_a_loss(given):
    loss = as_loss(given)
    labels = PAIR[1] if not isinstance(given, nn.L1Loss) else torch.randn(4, 10)
    model = classifier()
    assert torch.equal(loss(model, (PAIR[0], labels)), given(model(PAIR[0]), labels))


class Distilled(nn.Module):
    def forward(self, student, batch):
        return of_model_and_batch(student, batch)


class Short(nn.Module):
    def forward(self, m, b):
        return of_model_and_batch(m, b)


class OfBatch(nn.Module):
    def forward(self, f, batch):
        return of_model_and_batch(f, batch)


@pytest.mark.parametrize(
    "given",
    [
        of_model_and_batch,
        Weighted(),
        Distilled(),
        Short(),
        OfBatch(),
        DefaultLoss(),
        None,
        3,
        max,
    ],
)
def test_a_loss_of_model_and_batch_stays_what_it_is(given):
    assert as_loss(given) is given


def test_a_criterion_needs_a_pair():
    with pytest.raises(WorkloadError, match=r"MSELoss compares outputs with labels, and the batch"):
        Criterion(nn.MSELoss())(classifier(), {"x": PAIR[0], "y": PAIR[1]})


def test_a_loss_of_a_model_that_was_taken_for_a_criterion_says_how_it_is_passed():
    class Unnamed(nn.Module):
        def forward(self, a, b):
            return of_model_and_batch(a, b)

    with pytest.raises(WorkloadError, match=r"Unnamed was called as a criterion.*loss=lambda"):
        as_loss(Unnamed())(classifier(), PAIR)
    with pytest.raises(WorkloadError, match="loss=lambda model, batch: criterion"):
        autobatch.tune(classifier(), target=8, sample=PAIR, loss=Unnamed(), gpu=CARD)


class Optional(nn.Module):
    """Takes a second argument that need not be given, as many classifiers do."""

    def __init__(self, **second):
        super().__init__()
        self.inner = classifier()
        self.forward = self.of(*second.items())

    def of(self, second):
        made = {}
        code = f"lambda x, {second[0]}={second[1]!r}: self.outputs(x, {second[0]})"
        made["forward"] = eval(code, {"self": self})
        return made["forward"]

    def outputs(self, x, second):
        outputs = self.inner(x)
        if second is None or second is False:
            return outputs
        return F.cross_entropy(outputs, second) if self.takes_labels else outputs

    takes_labels = False


@pytest.mark.parametrize("second", [{"return_features": False}, {"attn_mask": None}])
def test_a_switch_or_a_mask_that_a_model_may_be_given_are_not_its_labels(second):
    model, default = Optional(**second), DefaultLoss()
    assert torch.equal(default(model, PAIR), of_model_and_batch(model.inner, PAIR))
    assert default.kind == "cross entropy"


@pytest.mark.parametrize("name", ["labels", "target", "y"])
def test_labels_that_a_model_may_be_given_are_given(name):
    model, default = Optional(**{name: None}), DefaultLoss()
    model.takes_labels = True
    assert torch.equal(default(model, PAIR), of_model_and_batch(model.inner, PAIR))
    assert default.kind == "scalar output"


def test_an_argument_that_may_be_labels_or_not_asks_for_a_loss():
    with pytest.raises(WorkloadError, match=r"labels, or what Optional takes as 'other'.*loss="):
        DefaultLoss()(Optional(other=None), PAIR)
    lengths = DefaultLoss()
    lengths(Optional(lengths=None), PAIR)
    assert lengths.kind == "surrogate sum"


def test_classes_beside_inputs_are_compared_by_cross_entropy_and_the_plan_says_so():
    model = classifier()
    default = DefaultLoss()
    assert torch.equal(default(model, PAIR), of_model_and_batch(model, PAIR))
    assert default.kind == "cross entropy"
    plan = autobatch.tune(model, target=64, sample=PAIR, gpu=CARD)
    stated = autobatch.tune(model, target=64, sample=PAIR, gpu=CARD, loss=nn.CrossEntropyLoss())
    assert plan.footprint == stated.footprint
    assert [w for w in plan.notes if w.startswith("no loss was given: cross entropy")]
    assert not [w for w in (*stated.warnings, *stated.notes) if "loss" in w]
    assert autobatch.check_equivalence(model, PAIR).equivalent


class Wrapped(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


def adapted():
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(classifier(), peft.LoraConfig(r=2, target_modules=["1"]))


def replaced():
    model = classifier()
    plain = model.forward
    model.forward = lambda *args, **kwargs: plain(*args, **kwargs)
    return model


@pytest.mark.parametrize(
    "make",
    [lambda: Wrapped(Wrapped(classifier())), adapted, replaced],
    ids=lambda make: make.__name__,
)
def test_a_wrapper_takes_what_the_model_in_it_takes(make):
    plan = autobatch.tune(make(), target=64, sample=PAIR, gpu=CARD)
    assert [note for note in plan.notes if note.startswith("no loss was given: cross entropy")]


def test_what_a_model_takes_is_asked_of_it_before_it_is_changed():
    class Branched(Wrapped):
        def __init__(self, inner):
            super().__init__(inner)
            self.other = nn.Linear(1, 1)

    model = classifier()
    workload = autobatch.Workload(
        model=model, batch=lambda n: (torch.randn(n, 3, 4, 4), torch.zeros(n).long())
    )
    plan = autobatch.tune(replace(workload, changes=(Branched,)), target=8, gpu=CARD)
    assert [note for note in plan.notes if note.startswith("no loss was given: cross entropy")]


@pytest.mark.parametrize("labels", [torch.randn(4, 10), torch.randint(10, (4, 2))])
def test_labels_that_are_no_classes_need_a_loss(labels):
    with pytest.raises(WorkloadError, match=r"takes the inputs alone.*pass loss="):
        autobatch.tune(classifier(), target=8, sample=(PAIR[0], labels), gpu=CARD)


def test_words_of_other_libraries_are_understood():
    options = {"sample": PAIR, "loss": of_model_and_batch, "gpu": CARD}
    plan = autobatch.tune(
        classifier(), target=np.int64(64), optimizer="sgd", autocast=torch.bfloat16, **options
    )
    same = autobatch.tune(
        classifier(), target=64, optimizer=torch.optim.SGD, autocast="bf16", **options
    )
    assert (plan.model, plan.footprint, plan.split) == (same.model, same.footprint, same.split)
    assert type(plan.target) is int
    assert autobatch.predict(classifier(), micro_batch=np.int32(8), **options).micro_batch == 8


def test_a_plan_and_a_footprint_are_short_to_look_at():
    plan = autobatch.tune(classifier(), target=64, sample=PAIR, gpu=CARD)
    assert repr(plan).startswith("<Plan of Sequential on card: 64 samples an update")
    assert len(repr(plan)) < 200
    table = str(plan.footprint).splitlines()
    assert "micro-batch 64 x 1 on card (simulated)" in table[0]
    allocated = next(row for row in table if "peak allocated" in row)
    assert f"{plan.footprint.peak_allocated_bytes:,}" in allocated
