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
from functools import partial
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
from autobatch.support.oom import Shortage, attempt
from autobatch.support.randomness import random_state_kept
from autobatch.support.ranks import ranks_here
from autobatch.support.wording import one_line
from autobatch.workload.dataset import draw
from autobatch.workload.kept import attributes_kept
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

_REASONS = {
    ("loss_is_scaled_for_ga", False): (
        "leaves num_items_in_batch aside",
        "so that it divides by the accumulation steps; the means of micro-batches count alike",
    ),
    ("loss_is_scaled_for_ga", True): (
        "divides by the accumulation steps itself",
        "so that it does not divide again",
    ),
    ("model_accepts_loss_kwargs", False): (
        "divides only a part by num_items_in_batch",
        "so that all of it is a mean, divided by the accumulation steps; the means of "
        "micro-batches count alike",
    ),
}
"""What each setting is the answer to, and what it does."""

_SAME, _SAME_IN_FP16 = 1e-3, 1e-2
"""Relative difference of gradients up to which they are equal: halving a loss is exact, but for
numbers at the lower end of fp16."""

_ROUNDING = 1e-6
"""Share of the largest gradient below which another one is rounding."""

_NOISE = 0.1
"""Relative difference of two runs of the same from which on nothing can be said."""

_BATCHES, _BATCHES_OF_RANKS = 16, 4
_SECONDS = 2.0
"""Micro-batches that are tried, and after which time there are enough of them."""

_SAMPLES, _SAMPLES_OF_LARGE, _LARGE = 2, 1, 2**27
"""Samples of a micro-batch, and those for models of more elements, which are slow on a CPU."""

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
    trial = _Trial(trainer, sample)
    first, unequal = 1.0, False  # as the trainer is
    for settings in _SETTINGS:
        if not all(hasattr(trainer, name) for name in settings):
            continue
        outcome = _of_all_ranks(trial.outcome(settings))
        if outcome.reason and not settings:
            return _untried(outcome.reason, steps)
        if outcome.ratio == 1 and not outcome.reason:
            break
        if not settings:
            first, unequal = outcome.ratio, outcome.differs_by_batch
        unequal = unequal or outcome.differs_by_batch
    else:
        refusal = _refusal(trainer, first, unequal)
        if steps > 1:
            raise UsageError(refusal)
        return Scaling(note=refusal)
    for name, value in settings.items():
        setattr(trainer, name, value)
    return Scaling(note=_note(trainer, settings, first, ended=outcome.ended))


class _Outcome(NamedTuple):
    """How two copies of a micro-batch compare with one, over all that were tried.

    `ratio` is that of the gradients where they differ most, 1.0 where all are equal; `ended` is
    that of one micro-batch in a window that an epoch ends; `reason` says why nothing is known.
    """

    ratio: float = 1.0
    differs_by_batch: bool = False
    ended: float = 1.0
    reason: str = ""


def _of_all_ranks(own: _Outcome) -> _Outcome:
    """Return the outcome that is furthest from equal, so that all ranks go on alike."""
    ranks = ranks_here()
    if ranks == 1:
        return own
    outcomes = [own] * ranks
    dist.all_gather_object(outcomes, own)
    reasons = [outcome for outcome in outcomes if outcome.reason]
    unequal = [outcome for outcome in outcomes if outcome.ratio != 1]
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


def _is_own(trainer: Trainer, method: str) -> bool:
    return getattr(type(trainer), method) is not getattr(Trainer, method)


def _whose_loss(trainer: Trainer) -> str:
    func = trainer.compute_loss_func
    if func is not None:
        return f"compute_loss_func {getattr(func, '__name__', type(func).__name__)}"
    return f"compute_loss of {type(trainer).__name__} with {type(trainer.model).__name__}"


def _refusal(trainer: Trainer, ratio: float, unequal: bool) -> str:
    if _is_own(trainer, "training_step"):
        whose = f"training_step of {type(trainer).__name__}"
        advice = "divide its loss by self.current_gradient_accumulation_steps, as Trainer's does"
    else:
        whose = _whose_loss(trainer)
        cause = "some batches" if unequal else "a part of the loss"
        advice = (
            f"only {cause} may be divided by num_items_in_batch; divide all by it, or none and set "
            "trainer.loss_is_scaled_for_ga=False"
        )
    return (
        f"{whose} gives {ratio:.3g} times the gradient where a micro-batch is accumulated twice, "
        f"and no setting of Trainer mends that: {advice}"
    )


def _note(
    trainer: Trainer, settings: Mapping[str, bool], ratio: float, *, ended: float
) -> str | None:
    said = []
    for name, value in settings.items():
        cause, effect = _REASONS[name, value]
        said.append(
            f"{_whose_loss(trainer)} {cause} (a micro-batch that was accumulated twice gave "
            f"{ratio:.3g} times its gradient): {name}={value} was set on the trainer, {effect}"
        )
    if ended != 1:
        said.append(
            f"{_whose_loss(trainer)} divides by args.gradient_accumulation_steps: a window of half "
            f"as many micro-batches at the end of an epoch has {ended:.3g} times its gradient; "
            "divide by self.current_gradient_accumulation_steps, or give it whole windows"
        )
    return "; ".join(said) or None


class _Trial:
    """Runs windows of a trainer, each on fresh copies.

    Ranks run the same number of windows, whatever they give: a loss may wait for the other ranks.
    """

    def __init__(self, trainer: Trainer, sample: Any) -> None:
        self._trainer = trainer
        self._sample = sample
        self._batches: list[Any] | None = None  # those of the first settings serve the others
        self._alone = ranks_here() == 1
        self._is_own = trainer.compute_loss_func is not None or any(
            _is_own(trainer, method) for method in ("training_step", "compute_loss")
        )
        has_fp16 = any(p.dtype == torch.float16 for p in trainer.model.parameters())
        self._same = _SAME_IN_FP16 if has_fp16 or trainer.args.fp16 else _SAME

    def outcome(self, settings: Mapping[str, bool]) -> _Outcome:
        """Compare gradients under some settings; what goes wrong is the outcome's reason."""
        reason = _hindrance(unwrapped(self._trainer.model))
        if reason:
            return _Outcome(reason=reason)
        try:
            found = attempt(lambda: self._compared(settings))
        except Exception as error:
            return _Outcome(reason=one_line(error))
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        return _Outcome(reason=found) if isinstance(found, Shortage) else found

    def _compared(self, settings: Mapping[str, bool]) -> _Outcome:
        run = partial(self._gradients, settings=settings)
        tried: list[Any] = []
        ratios: list[float] = []
        ended = 1.0
        for batch in self._until_enough() if self._batches is None else self._batches:
            tried.append(batch)
            one = run(batch, steps=1, ran=1)
            if self._alone and not _says_something(one):
                continue
            two = run(batch, steps=2, ran=2)
            differs = _ratio(two, one, times=2, same=self._same) != 1
            again = run(batch, steps=1, ran=1) if differs or not self._alone else one
            half = run(batch, steps=2, ran=1) if self._is_own and len(tried) == 1 else one
            if not _says_something(one):
                continue
            noise = [(a - b).norm() for a, b in zip(again, one, strict=True)]
            if torch.stack(noise).norm() > _NOISE * torch.stack([g.norm() for g in one]).norm():
                return _Outcome(reason="the same batch gives other gradients each time")
            ratios.append(_ratio(two, one, times=2, same=self._same, noise=noise))
            if half is not one:
                ended = _ratio(half, one, times=1, same=self._same, noise=noise)
        self._batches = tried
        if not ratios:
            return _Outcome(reason="no batch gave a finite gradient that is not zero")
        return _Outcome(
            ratio=_furthest(ratios),
            differs_by_batch=max(ratios) - min(ratios) > self._same,
            ended=ended,
        )

    def _until_enough(self) -> Iterator[Any]:
        started = time.monotonic()
        elements = sum(parameter.numel() for parameter in self._trainer.model.parameters())
        samples = _SAMPLES if elements < _LARGE else _SAMPLES_OF_LARGE
        for batch in _micro_batches(self._sample, samples):
            yield batch
            if self._alone and time.monotonic() - started > _SECONDS:
                return

    def _gradients(
        self, batch: Any, *, settings: Mapping[str, bool], steps: int, ran: int
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
        # as a scaler would, that the gradients are no subnormal numbers
        scale = 2.0**10 if args.fp16 else 1.0
        trainer.accelerator.backward = lambda loss, **_: (loss * scale).backward(inputs=compared)
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


def _ratio(
    gradients: Sequence[Tensor],
    others: Sequence[Tensor],
    *,
    times: int,
    same: float,
    noise: Sequence[Tensor] | None = None,
) -> float:
    """Return how gradients, so many times, compare with others; 1.0 where they are equal.

    Each parameter is compared by itself, as a part of the loss may reach only few of them; those
    whose gradient is rounding, beside the largest, are left out. `noise` is how far each gradient
    is from itself in another run.
    """
    largest = max(other.norm() for other in others)
    ratios = [1.0]
    for index, (gradient, other) in enumerate(zip(gradients, others, strict=True)):
        norm = torch.maximum(other.norm(), gradient.norm())
        difference = (times * gradient - other).norm()
        floor = 0.0 if noise is None else 10 * noise[index]
        if norm > _ROUNDING * largest and difference > same * norm and difference > floor:
            ratio = float(times * gradient.norm() / other.norm())
            ratios.append(ratio if abs(ratio - 1) > same else 1 + float(difference / norm))
    return _furthest(ratios)


def _furthest(ratios: Sequence[float]) -> float:
    return max(ratios, key=lambda ratio: abs(ratio - 1))


# The micro-batches that are tried.


def _micro_batches(sample: Any, samples: int) -> Iterator[Any]:
    """Yield small batches from all over a training set; any other sample as a small batch."""
    most = _BATCHES if ranks_here() == 1 else _BATCHES_OF_RANKS
    if not isinstance(sample, DataLoader) and isinstance(sample, Dataset):
        sample = DataLoader(sample)
    if not isinstance(sample, DataLoader):
        yield built(draw(sample))(samples)
        return
    dataset, collate = sample.dataset, sample.collate_fn
    batched = sample.batch_sampler is not None or sample.batch_size is not None
    size = samples if batched else 1
    with random_state_kept(), attributes_kept(dataset, collate):
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
