"""Whether transformers' Trainer gives a window of micro-batches the gradient of one batch.

Trainer divides the loss of a micro-batch by the accumulation steps, unless it believes that the
loss was divided by `num_items_in_batch` already. It believes so of every model that takes keyword
arguments and of every `compute_loss_func`, and is wrong where these leave the count aside: the
gradient then grows with the steps. So the trainer's own `training_step` is run for a window of one
micro-batch and for a window of two copies of it, whose gradients have to be equal.

Invariant: all of this runs on copies of the trainer and of what it holds, and every run starts from
the same state; of the trainer itself, at most the one attribute is set that makes windows right.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import Trainer

from autobatch.devices.copies import Copier
from autobatch.errors import UsageError
from autobatch.exports.transformers import RECOMPUTE
from autobatch.support.host_memory import free_host_bytes
from autobatch.support.randomness import random_state_kept
from autobatch.support.ranks import ranks_here
from autobatch.support.wording import one_line
from autobatch.workload.dataset import attributes_kept, draw
from autobatch.workload.sample import built
from autobatch.workload.tree import map_tensors
from autobatch.workload.wrappers import unwrapped

__all__ = ["Scaling", "settle_scaling"]

_SETTINGS: tuple[Mapping[str, bool], ...] = (
    {},
    {"loss_is_scaled_for_ga": False},  # since transformers 5.20
    {"loss_is_scaled_for_ga": True},
    {"model_accepts_loss_kwargs": False},
)
"""What Trainer can be told, least first; the last takes the count away from the model."""

_SAME = 1e-3
"""Relative difference of gradients up to which they are equal: halving a loss is exact."""

_BATCHES, _BATCHES_OF_RANKS = 16, 4
_SAMPLES = 2
_SECONDS = 3.0
"""Micro-batches that are tried, their samples, and after which time there are enough of them."""

_ELEMENTS = 2**22
"""Elements of the parameters whose gradients are compared, the smallest parameters first."""


@dataclass(frozen=True, slots=True)
class Scaling:
    """What was found of a trainer's loss.

    Attributes:
        note: what was set, or what is left to say, in one sentence.
        is_known: False where the loss could not be tried.
    """

    note: str | None = None
    is_known: bool = True


def settle_scaling(trainer: Trainer, sample: Any, *, steps: int) -> Scaling:
    """Let a trainer scale its loss such that windows have the gradient of one batch.

    In a distributed run all ranks call it, and set the same.

    Args:
        trainer: its model is where it will be trained.
        sample: a DataLoader or Dataset of the training set, or one batch.
        steps: accumulation steps of the training; with 1, nothing is refused.

    Raises:
        UsageError: the gradient depends on the accumulation steps whatever the trainer is told.
    """
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return _untried("its parameters are sharded", steps)
    trial = _Trial(trainer)
    first: float | None = None
    unequal = False
    for settings in _SETTINGS:
        if not all(hasattr(trainer, name) for name in settings):
            continue
        outcome = _of_all_ranks(trial.outcome(settings, sample))
        if outcome.reason and not settings:
            return _untried(outcome.reason, steps)
        if outcome.ratio is None and not outcome.reason:
            break
        first = first or outcome.ratio
        unequal = unequal or outcome.differs_by_batch
        unequal = unequal or outcome.differs_by_batch
    else:
        refusal = _refusal(trainer, first or 0.0, unequal)
        if steps > 1:
            raise UsageError(refusal)
        return Scaling(note=refusal)
    for name, value in settings.items():
        setattr(trainer, name, value)
    return Scaling(note=_note(trainer, settings, first, partial=outcome.partial))


class _Outcome(NamedTuple):
    """How two copies of a micro-batch compare with one, over all that were tried.

    `ratio` is that of the gradients where they differ most, None where all are equal; `partial` is
    that of one micro-batch in a window that an epoch ends; `reason` says why nothing is known.
    """

    ratio: float | None = None
    differs_by_batch: bool = False
    partial: float = 1.0
    reason: str = ""


def _of_all_ranks(own: _Outcome) -> _Outcome:
    """Return the outcome that is furthest from equal, so that all ranks go on alike."""
    ranks = ranks_here()
    if ranks == 1:
        return own
    outcomes = [own] * ranks
    dist.all_gather_object(outcomes, own)
    reasons = [outcome for outcome in outcomes if outcome.reason]
    unequal = [outcome for outcome in outcomes if outcome.ratio is not None]
    return (*reasons, *unequal, *sorted(outcomes))[0]


def _untried(reason: str, steps: int) -> Scaling:
    if steps == 1:
        return Scaling(is_known=False)
    return Scaling(
        note=f"whether compute_loss divides by num_items_in_batch was not tried ({reason}): "
        "compare the gradient norms of 1 and 2 accumulation steps, and set "
        "trainer.loss_is_scaled_for_ga=False where they differ",
        is_known=False,
    )


def _whose_loss(trainer: Trainer) -> str:
    func = trainer.compute_loss_func
    if func is not None:
        return f"compute_loss_func {getattr(func, '__name__', type(func).__name__)}"
    return f"compute_loss of {type(trainer).__name__} with {type(trainer.model).__name__}"


def _refusal(trainer: Trainer, ratio: float, unequal: bool) -> str:
    cause = "some batches" if unequal else "a part of the loss"
    return (
        f"{_whose_loss(trainer)} gives {ratio:.3g} times the gradient where a micro-batch is "
        "accumulated twice, and no setting of Trainer mends that (only "
        f"{cause} may be divided by num_items_in_batch): divide all of the loss by "
        "num_items_in_batch, or none and set trainer.loss_is_scaled_for_ga=False"
    )


def _note(
    trainer: Trainer, settings: Mapping[str, bool], ratio: float | None, *, partial: float
) -> str | None:
    said = []
    for name, value in settings.items():
        means = (
            "" if value else ", and the means of micro-batches count alike, whatever their sizes"
        )
        said.append(
            f"{_whose_loss(trainer)} gave {ratio:.3g} times the gradient where a micro-batch was "
            f"accumulated twice, as num_items_in_batch was not what it divides by: {name}={value} "
            f"was set on the trainer, which mends that{means}"
        )
    if abs(partial - 1) > _SAME:
        said.append(
            f"{_whose_loss(trainer)} divides by args.gradient_accumulation_steps: a window of half "
            f"as many micro-batches at the end of an epoch has {partial:.3g} times its gradient; "
            "divide by self.current_gradient_accumulation_steps, or give it whole windows"
        )
    return "; ".join(said) or None


class _Trial:
    """Runs windows of a trainer, each on fresh copies."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._batches: list[Any] | None = None

    def outcome(self, settings: Mapping[str, bool], sample: Any) -> _Outcome:
        """Compare gradients under some settings; what goes wrong is the outcome's reason."""
        reason = _hindrance(unwrapped(self._trainer.model))
        if reason:
            return _Outcome(reason=reason)
        try:
            return self._compared(settings, sample)
        except Exception as error:
            return _Outcome(reason=one_line(error))

    def _compared(self, settings: Mapping[str, bool], sample: Any) -> _Outcome:
        first = self._batches is None
        batches = _micro_batches(sample) if self._batches is None else iter(self._batches)
        tried: list[Any] = []
        ratios: list[float] = []
        partial, started = 1.0, time.monotonic()
        for batch in batches:
            tried.append(batch)
            one = self._gradients(batch, settings, steps=1, ran=1)
            if _says_something(one):
                two = self._gradients(batch, settings, steps=2, ran=2)
                ratio = _ratio(two, one, times=2)
                if ratio is not None and _ratio(
                    self._gradients(batch, settings, steps=1, ran=1), one, times=1
                ):
                    return _Outcome(reason="the same batch gives different gradients each time")
                if not ratios:
                    half = self._gradients(batch, settings, steps=2, ran=1)
                    partial = _ratio(half, one, times=1) or 1.0
                ratios.append(ratio or 1.0)
            enough = time.monotonic() - started > _SECONDS and ranks_here() == 1
            if first and enough:
                break
        self._batches = tried
        if not ratios:
            return _Outcome(reason="no batch gave a finite gradient that is not zero")
        worst = max(ratios, key=lambda ratio: abs(ratio - 1))
        return _Outcome(
            ratio=None if worst == 1.0 else worst,
            differs_by_batch=max(ratios) - min(ratios) > _SAME,
            partial=partial,
        )

    def _gradients(
        self, batch: Any, settings: Mapping[str, bool], *, steps: int, ran: int
    ) -> list[Tensor]:
        """Return what one of `ran` copies of a micro-batch adds in a window of so many steps."""
        original = unwrapped(self._trainer.model)
        device = next(original.parameters()).device
        copier = Copier(device, _with_values)
        try:
            model = copier.model(original)
            step = copier.any(_Step(self._trainer, settings, steps, ran))
            devices = [device] if device.type == "cuda" else []
            with (
                random_state_kept(),
                torch.random.fork_rng(devices),
                warnings.catch_warnings(),
                copier.stage(),
            ):
                warnings.simplefilter("ignore")
                return step(model, map_tensors(Tensor.clone, batch))  # type: ignore[no-any-return]
        finally:
            copier.close()


class _Step:
    """The trainer's own training step of one micro-batch, for a copy of the trainer."""

    def __init__(
        self, trainer: Trainer, settings: Mapping[str, bool], steps: int, ran: int
    ) -> None:
        self._trainer = trainer
        self._settings = dict(settings)
        self._steps = steps
        self._ran = ran

    def __call__(self, model: nn.Module, batch: Any) -> list[Tensor]:
        trainer, args = self._trainer, self._trainer.args
        for name, value in self._settings.items():
            setattr(trainer, name, value)
        args.gradient_accumulation_steps = self._steps
        args.average_tokens_across_devices = False  # ranks count their own, without each other
        args.torch_empty_cache_steps = None
        trainer.current_gradient_accumulation_steps = self._ran
        if getattr(model, f"is_{RECOMPUTE}", False):  # it may not take `inputs` of backward
            getattr(model, f"{RECOMPUTE}_disable")()
        compared = _compared_parameters(model)
        for parameter in model.parameters():
            parameter.grad = None
        trainer.accelerator.backward = lambda loss, **_: loss.backward(inputs=compared)
        window = [batch] * self._ran
        _, items = trainer.get_batch_samples(iter(window), self._ran, args.device)
        trainer.training_step(model, batch, items)
        return [_read(parameter) for parameter in compared]


def _read(parameter: Tensor) -> Tensor:
    gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    return gradient.detach().to_dense().double().cpu()


def _compared_parameters(model: nn.Module) -> list[Tensor]:
    """Return the trainable parameters, of large models the smallest, which are in every layer."""
    trainable = (parameter for parameter in model.parameters() if parameter.requires_grad)
    chosen: list[Tensor] = []
    elements = 0
    for parameter in sorted(trainable, key=Tensor.numel):
        elements += parameter.numel()
        if chosen and elements > _ELEMENTS:
            break
        chosen.append(parameter)
    return chosen


def _with_values(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.detach().to(device, copy=True)


def _hindrance(model: nn.Module) -> str:
    """Say why copies of a model cannot be run; nothing where they can."""
    parameters = list(model.parameters())
    if not any(parameter.requires_grad for parameter in parameters):
        return "no parameter is trained"
    if any(parameter.is_meta for parameter in parameters):
        return "its parameters have no values"
    host_bytes = sum(p.nbytes for p in parameters if p.device.type == "cpu")
    free_bytes = free_host_bytes()
    if free_bytes is not None and 2 * host_bytes > free_bytes:
        return "the host has no room for a second copy of the model"
    return ""


def _says_something(gradients: Sequence[Tensor]) -> bool:
    """Whether gradients are finite and not all zero."""
    norms = torch.stack([gradient.norm() for gradient in gradients])
    return bool(norms.isfinite().all() and norms.any())


def _ratio(gradients: Sequence[Tensor], others: Sequence[Tensor], *, times: int) -> float | None:
    """Return how gradients, so many times, compare with others; None where they are equal.

    Each parameter is compared by itself, as a part of the loss may reach only few of them; those
    whose gradient is rounding, beside the largest, are left out.
    """
    largest = max(other.norm() for other in others)
    ratios = [1.0]
    for gradient, other in zip(gradients, others, strict=True):
        norm = torch.maximum(other.norm(), gradient.norm())
        difference = (times * gradient - other).norm() / norm
        if norm > _SAME**2 * largest and difference > _SAME:
            ratio = float(times * gradient.norm() / other.norm())
            ratios.append(ratio if abs(ratio - 1) > _SAME else 1 + float(difference))
    return max(ratios, key=lambda ratio: abs(ratio - 1)) if len(ratios) > 1 else None


# The micro-batches that are tried.


def _micro_batches(sample: Any) -> Iterator[Any]:
    """Yield small batches from all over a training set; any other sample as a small batch."""
    most = _BATCHES if ranks_here() == 1 else _BATCHES_OF_RANKS
    if not isinstance(sample, DataLoader) and isinstance(sample, Dataset):
        sample = DataLoader(sample)
    if not isinstance(sample, DataLoader):
        yield built(draw(sample))(_SAMPLES)
        return
    dataset, collate = sample.dataset, sample.collate_fn
    batched = sample.batch_sampler is not None or sample.batch_size is not None
    size = _SAMPLES if batched else 1
    with random_state_kept(), attributes_kept(dataset):
        items = _items(dataset, most * size)
        while chunk := list(islice(items, size)):
            yield collate(chunk if batched else chunk[0])


def _items(dataset: Any, number: int) -> Iterator[Any]:
    """Yield the first items of a stream, or random ones of a data set with a length."""
    sized = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
    if isinstance(dataset, IterableDataset) or not sized:
        yield from islice(dataset, number)
        return
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))
    for index in order[:number].tolist():
        yield dataset[index]
