"""What a plan means for training: pure functions from a plan to facts, sentences and code.

Invariant: every figure comes from the plan; what is extrapolated is called predicted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from autobatch.plan import MemoryPoint, Plan
from autobatch.units import format_bytes

__all__ = [
    "AccumulationRow",
    "LearningRateRule",
    "accumulation_rows",
    "accumulation_summary",
    "batchnorm",
    "count",
    "effective_batch",
    "equivalence_conditions",
    "extrapolate_peak",
    "learning_rate",
    "learning_rate_factors",
    "learning_rate_rule",
    "other_window",
    "samples_per_update",
    "scale_lr",
    "training_loop",
    "window_text",
]

LearningRateRule = Literal["linear", "square root"]

_ADAPTIVE = ("adam", "rmsprop", "adagrad", "adafactor", "adadelta")
_AUTOCAST = {"bf16": "torch.bfloat16", "fp16": "torch.float16"}


def count(number: int, noun: str) -> str:
    """Render a number with its noun, in the plural where it is not one.

    >>> count(1, "GPU"), count(1024, "sample")
    ('1 GPU', '1,024 samples')
    """
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def window_text(window: Sequence[int]) -> str:
    """Write the micro-batches of one rank's window, repeated sizes once.

    >>> window_text((86, 85, 85)), window_text((64, 64, 64, 64))
    ('86 + 2 × 85', '4 × 64')
    """
    runs = [(size, len(list(group))) for size, group in groupby(window)]
    return " + ".join(
        f"{length} × {size:,}" if length > 1 else f"{size:,}" for size, length in runs
    )


def effective_batch(plan: Plan) -> str:
    """Say how micro-batch, accumulation steps and GPUs make the effective batch."""
    steps = count(plan.accumulation_steps, "accumulation step")
    gpus = count(plan.world_size, "GPU")
    if plan.split.uniform:
        return (
            f"micro-batch {plan.micro_batch:,} × {steps} × {gpus} "
            f"= effective batch {plan.effective_batch:,}"
        )
    smallest = min(map(min, plan.split.windows))
    return (
        f"micro-batches of {plan.micro_batch:,} and {smallest:,} over {steps} × {gpus} "
        f"= effective batch {plan.effective_batch:,}"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class AccumulationRow:
    """One part of the memory in the planned window, and in the same samples divided otherwise.

    `other_bytes` is predicted, and None where the plan does not allow a prediction.
    """

    part: str
    planned_bytes: int
    other_bytes: int | None
    note: str


def samples_per_update(plan: Plan) -> int:
    """Return the samples that the busiest GPU runs between two optimizer updates."""
    return max(map(sum, plan.split.windows))


def extrapolate_peak(plan: Plan, micro_batch: int) -> int | None:
    """Extend the memory curve in a straight line to a micro-batch, in allocated bytes.

    The line goes through the upper half of the curve, where constant terms no longer hide the
    growth. Returns None where the curve has fewer than two sizes.
    """
    points = sorted(plan.curve, key=lambda point: point.micro_batch)
    exact = [point for point in points if point.micro_batch == micro_batch]
    if exact:
        return exact[0].peak_allocated_bytes
    if len({point.micro_batch for point in points}) < 2:
        return None
    low, high = _upper_half(points)
    growth = (high.peak_allocated_bytes - low.peak_allocated_bytes) / (
        high.micro_batch - low.micro_batch
    )
    return round(high.peak_allocated_bytes + growth * (micro_batch - high.micro_batch))


def other_window(plan: Plan) -> tuple[int, int] | None:
    """Return (steps, micro-batch) to compare the plan with: all at once, or two halves.

    None where a single sample cannot be divided.
    """
    samples = samples_per_update(plan)
    if plan.accumulation_steps > 1:
        return 1, samples
    return (2, math.ceil(samples / 2)) if samples > 1 else None


def accumulation_rows(plan: Plan) -> tuple[AccumulationRow, ...]:
    """Compare the planned window with the one of `other_window`."""
    other = other_window(plan)
    if other is None:
        return ()
    planned = plan.footprint
    weights = planned.parameters_bytes + planned.buffers_bytes
    resident = max(planned.gradients_bytes, plan.ceiling_footprint.gradients_bytes)
    peak = extrapolate_peak(plan, other[1])
    rest = None if peak is None else peak - weights - planned.optimizer_bytes - resident
    return (
        AccumulationRow(
            part="weights and buffers",
            planned_bytes=weights,
            other_bytes=weights,
            note="the same: they do not depend on the batch",
        ),
        AccumulationRow(
            part="optimizer state",
            planned_bytes=planned.optimizer_bytes,
            other_bytes=planned.optimizer_bytes,
            note="the same: one update per window either way",
        ),
        AccumulationRow(
            part="gradients at the peak",
            planned_bytes=planned.gradients_bytes,
            other_bytes=resident,
            note="never larger than the weights, but with accumulation they stay for all later "
            "micro-batches",
        ),
        AccumulationRow(
            part="activations and the rest",
            planned_bytes=planned.peak_allocated_bytes
            - weights
            - planned.optimizer_bytes
            - planned.gradients_bytes,
            other_bytes=rest,
            note="different: they grow with the micro-batch, and only one is alive at a time",
        ),
        AccumulationRow(
            part="peak allocated",
            planned_bytes=planned.peak_allocated_bytes,
            other_bytes=peak,
            note="the sum",
        ),
    )


def accumulation_summary(plan: Plan) -> str:
    """Say in words what accumulation saves on this model and what it costs."""
    samples = samples_per_update(plan)
    other = other_window(plan)
    peak = extrapolate_peak(plan, other[1]) if other else None
    if plan.accumulation_steps == 1:
        text = (
            f"This plan needs no accumulation: {count(samples, 'sample')} per GPU fit into one "
            "forward/backward, and gradients are freed before the next one begins."
        )
        if other is None or peak is None:
            return text
        return (
            f"{text} As {other[0]} × {other[1]:,} the peak would be about {format_bytes(peak)} "
            "allocated (predicted), with the gradients resident."
        )
    text = (
        f"Each GPU runs {count(samples, 'sample')} per update as "
        f"{window_text(max(plan.split.windows, key=sum))}."
    )
    if peak is None:
        return f"{text} What they would need at once is unknown: the curve has a single size."
    verdict = "more than" if peak > plan.budget_bytes else "within"
    return (
        f"{text} At once they would need about {format_bytes(peak)} (predicted by extending the "
        f"curve in a straight line), {verdict} the budget of {format_bytes(plan.budget_bytes)}. "
        "That figure keeps the gradients resident; without accumulation up to "
        f"{format_bytes(plan.footprint.gradients_bytes)} less is needed, because they are freed "
        "before the next forward pass."
    )


def equivalence_conditions(plan: Plan) -> tuple[str, ...]:
    """List what must hold for the accumulated gradient to equal that of the whole batch."""
    weight = (
        f"1/{plan.accumulation_steps}"
        if plan.split.uniform and plan.accumulation_steps > 1
        else f"its share of the {plan.effective_batch:,} samples"
    )
    conditions = [
        f"The loss is a mean over samples, and each micro-batch's loss is weighted by {weight}. "
        "A mean over tokens needs its share of the window's tokens instead.",
        "No layer or loss looks across the samples of a batch: BatchNorm and in-batch contrastive "
        "losses see one micro-batch, not the effective batch.",
        "Clipping, the update, zeroing the gradients and the learning-rate schedule happen once "
        "per window, not once per micro-batch.",
        "Equal means up to floating-point rounding; dropout draws other random numbers.",
    ]
    return tuple(conditions)


def batchnorm(plan: Plan) -> str:
    """Say whether the model has BatchNorm and what accumulation means for it."""
    layers = plan.model.batchnorm_layers
    if layers == 0:
        return (
            "The model has no BatchNorm layers: no statistics depend on the micro-batch, so its "
            "size changes memory and speed, not the result."
        )
    seen = (
        f"The model has {count(layers, 'BatchNorm layer')}. In training they normalise with the "
        f"statistics of one micro-batch of {plan.micro_batch:,}"
    )
    if plan.accumulation_steps == 1 and plan.world_size == 1:
        return f"{seen}, which is the whole effective batch here."
    advice = [
        f"{seen}, not of the effective batch of {plan.effective_batch:,}, and move their running "
        f"averages {count(plan.accumulation_steps, 'time')} per optimizer update.",
        "The result is therefore not identical to training without accumulation.",
    ]
    if plan.micro_batch < 16:
        advice.append(
            "Statistics of fewer than 16 samples are noisy and cost accuracy "
            "(Wu and He 2018, Group Normalization, https://arxiv.org/abs/1803.08494)."
        )
    if plan.ceiling_at_least > plan.micro_batch:
        advice.append(
            f"A larger micro-batch helps: up to {plan.ceiling_at_least:,} fits on this GPU."
        )
    if plan.world_size > 1:
        advice.append(
            "torch.nn.SyncBatchNorm.convert_sync_batchnorm(model) shares the statistics between "
            "GPUs, but not between accumulation steps."
        )
    advice.append(
        "Where it matters, use GroupNorm or LayerNorm, or freeze the statistics by putting these "
        "layers into evaluation mode."
    )
    return " ".join(advice)


def learning_rate_rule(optimizer: str) -> LearningRateRule | None:
    """Return how the learning rate follows the effective batch for an optimizer's class name.

    Linear for SGD (Goyal et al. 2017), square root for adaptive optimizers (Krizhevsky 2014,
    Malladi et al. 2022); None where no rule is established.

    >>> learning_rate_rule("AdamW"), learning_rate_rule("SGD"), learning_rate_rule("Lion")
    ('square root', 'linear', None)
    """
    name = optimizer.lower()
    if any(adaptive in name for adaptive in _ADAPTIVE):
        return "square root"
    return "linear" if name.startswith("sgd") else None


def scale_lr(
    learning_rate: float, *, tuned_for: int, effective_batch: int, optimizer: str
) -> float:
    """Scale a learning rate from the effective batch it was tuned for to another one.

    Raises:
        ValueError: no rule is established for this optimizer.

    >>> scale_lr(0.1, tuned_for=64, effective_batch=256, optimizer="SGD")
    0.4
    >>> scale_lr(1e-4, tuned_for=64, effective_batch=256, optimizer="AdamW")
    0.0002
    """
    rule = learning_rate_rule(optimizer)
    if rule is None:
        raise ValueError(
            f"no rule scales the learning rate of {optimizer!r}: try the linear one and the "
            "square root, and keep what trains better"
        )
    growth = effective_batch / tuned_for
    return learning_rate * (growth if rule == "linear" else math.sqrt(growth))


def learning_rate(plan: Plan) -> str:
    """Say what the learning rate should do if the effective batch differs from the tuned one."""
    optimizer = plan.model.optimizer
    unchanged = (
        f"Accumulation alone changes nothing: if your learning rate was tuned for an effective "
        f"batch of {plan.effective_batch:,}, keep it."
    )
    rule = learning_rate_rule(optimizer)
    if rule == "linear":
        return (
            f"{unchanged} Otherwise scale it linearly with the effective batch, as for SGD: twice "
            "the batch, twice the rate, with a warm-up over the first epochs (Goyal et al. 2017, "
            "https://arxiv.org/abs/1706.02677). The rule breaks down for very large batches."
        )
    if rule == "square root":
        return (
            f"{unchanged} Otherwise scale it with the square root of the effective batch, as "
            f"{optimizer} is adaptive: four times the batch, twice the rate (Krizhevsky 2014, "
            "https://arxiv.org/abs/1404.5997; Malladi et al. 2022, "
            "https://arxiv.org/abs/2205.10287, who also move the betas and epsilon)."
        )
    return (
        f"{unchanged} Otherwise no rule is established for {optimizer}: SGD scales linearly "
        "(Goyal et al. 2017, https://arxiv.org/abs/1706.02677), adaptive optimizers with the "
        "square root (Krizhevsky 2014, https://arxiv.org/abs/1404.5997; Malladi et al. 2022, "
        "https://arxiv.org/abs/2205.10287); try both."
    )


def learning_rate_factors(plan: Plan) -> tuple[tuple[int, float], ...]:
    """Return (effective batch it was tuned for, factor on the learning rate), smallest first."""
    if learning_rate_rule(plan.model.optimizer) is None:
        return ()
    sizes = sorted({max(1, plan.effective_batch // part) for part in (8, 4, 2, 1)})
    return tuple(
        (
            size,
            scale_lr(
                1.0,
                tuned_for=size,
                effective_batch=plan.effective_batch,
                optimizer=plan.model.optimizer,
            ),
        )
        for size in sizes
    )


def training_loop(plan: Plan) -> str:
    """Write the training loop of the plan as Python to paste, in plain PyTorch.

    It expects `model`, `optimizer`, `dataset`, `epochs` and, where the loss is the user's own,
    `loss_fn(model, batch)` returning a mean over samples. The gradient of each window equals that
    of its effective batch, for uniform and ragged windows, on one GPU, under
    DistributedDataParallel or FSDP2. An incomplete last window of an epoch is left out.
    """
    setup = ["import torch", "from torch.utils.data import DataLoader"]
    if plan.world_size > 1:
        wraps = not _is_sharded(plan)
        if plan.accumulation_steps > 1 and wraps:
            setup.insert(0, "from contextlib import nullcontext\n")
        if wraps:
            setup.append("from torch.nn.parallel import DistributedDataParallel")
        if plan.split.uniform:
            setup.append("from torch.utils.data.distributed import DistributedSampler")
        setup += [
            "",
            "model = DistributedDataParallel(model)"
            if wraps
            else "# before making the optimizer: fully_shard each block, then the model",
        ]
    setup.append("")
    if plan.model.autocast == "fp16":
        setup.append('scaler = torch.amp.GradScaler("cuda")')
    loop = _uniform_epoch(plan) if plan.split.uniform else _ragged_epoch(plan)
    return "\n".join([*setup, *loop]) + "\n"


def _is_sharded(plan: Plan) -> bool:
    return plan.sharding in ("fsdp", "custom")


def _uniform_epoch(plan: Plan) -> list[str]:
    steps = plan.accumulation_steps
    order = "sampler=sampler" if plan.world_size > 1 else "shuffle=True"
    lines = ["sampler = DistributedSampler(dataset)"] if plan.world_size > 1 else []
    lines += [
        f"loader = DataLoader(dataset, batch_size={plan.micro_batch}, {order}, drop_last=True)",
        *([f"steps = {steps}  # accumulation steps of one training window"] if steps > 1 else []),
        "",
        "for epoch in range(epochs):",
        *(["    sampler.set_epoch(epoch)"] if plan.world_size > 1 else []),
    ]
    if steps == 1:
        return [
            *lines,
            "    for batch in loader:  # move it to the GPU as you do now",
            *_indent(_forward_backward(plan, ""), 8),
            *_indent(_update(plan), 8),
        ]
    return [
        *lines,
        "    batches = iter(loader)",
        "    for _ in range(len(loader) // steps):",
        "        for step in range(steps):",
        "            batch = next(batches)  # move it to the GPU as you do now",
        *_indent(_micro_batch(plan, " / steps"), 12),
        *_indent(_update(plan), 8),
    ]


def _ragged_epoch(plan: Plan) -> list[str]:
    target, world, steps = plan.effective_batch, plan.world_size, plan.accumulation_steps
    if world == 1:
        sizes, epoch, shuffle = f"{plan.split.windows[0]}", "", "torch.randperm(len(dataset))"
        parts = ["parts = window.split(sizes)"]
        comment = "micro-batches of one training window"
    else:
        sizes, epoch = f"{plan.split.windows}[rank]", "epoch"
        shuffle = "torch.randperm(len(dataset), generator=torch.Generator().manual_seed(epoch))"
        everyone = [size for window in plan.split.windows for size in window]
        parts = [
            f"parts = window.split({everyone})[rank * {steps} : (rank + 1) * {steps}]",
        ]
        comment = "this rank's micro-batches of one training window"
    weight = f" * size / {target}" if world == 1 else f" * size * {world} / {target}"
    step = "step, size" if world > 1 and steps > 1 and not _is_sharded(plan) else "size"
    return [
        *(["rank = torch.distributed.get_rank()"] if world > 1 else []),
        f"sizes = {sizes}  # {comment}",
        "",
        "",
        f"def micro_batches({epoch}):",
        f"    order = {shuffle}",
        f"    for window in order.split({target}):",
        f"        if len(window) == {target}:",
        *_indent(parts, 12),
        "            yield from (part.tolist() for part in parts)",
        "",
        "",
        "for epoch in range(epochs):",
        f"    batches = iter(DataLoader(dataset, batch_sampler=micro_batches({epoch})))",
        f"    for _ in range(len(dataset) // {target}):",
        f"        for {step} in {'enumerate(sizes)' if step != 'size' else 'sizes'}:",
        "            batch = next(batches)  # move it to the GPU as you do now",
        *_indent(_micro_batch(plan, weight), 12),
        *_indent(_update(plan), 8),
    ]


def _micro_batch(plan: Plan, weight: str) -> list[str]:
    body = _forward_backward(plan, weight)
    if plan.world_size == 1 or plan.accumulation_steps == 1 or _is_sharded(plan):
        return body
    return [
        f"last = step == {plan.accumulation_steps - 1}  # gradients are reduced once per window",
        "with nullcontext() if last else model.no_sync():",
        *_indent(body, 4),
    ]


def _forward_backward(plan: Plan, weight: str) -> list[str]:
    loss = f"loss = {_loss_call(plan)}"
    autocast = plan.model.autocast
    forward = [loss]
    if autocast is not None:
        forward = [
            f'with torch.autocast("cuda", dtype={_AUTOCAST[autocast]}):',
            *_indent([loss], 4),
        ]
    weighted = f"(loss{weight})" if weight else "loss"
    if autocast == "fp16":
        return [*forward, f"scaler.scale({weighted.strip('()')}).backward()"]
    return [*forward, f"{weighted}.backward()"]


def _loss_call(plan: Plan) -> str:
    if plan.model.loss == "output.loss":
        return "model(**batch).loss"
    if plan.model.loss == "scalar output":
        return "model(batch)"
    return "loss_fn(model, batch)"


def _update(plan: Plan) -> list[str]:
    scaled = plan.model.autocast == "fp16"
    clip = [f"torch.nn.utils.clip_grad_norm_(model.parameters(), {plan.model.clip_norm})"]
    lines = ["scaler.unscale_(optimizer)"] if scaled and plan.model.clip_norm is not None else []
    lines += clip if plan.model.clip_norm is not None else []
    lines += ["scaler.step(optimizer)", "scaler.update()"] if scaled else ["optimizer.step()"]
    return [*lines, "optimizer.zero_grad()"]


def _indent(lines: Sequence[str], width: int) -> list[str]:
    return [" " * width + line if line else line for line in lines]


def _upper_half(points: Sequence[MemoryPoint]) -> tuple[MemoryPoint, MemoryPoint]:
    high = points[-1]
    below = [point for point in points if point.micro_batch < high.micro_batch]
    upper = [point for point in below if 2 * point.micro_batch >= high.micro_batch]
    return (upper[0] if upper else below[-1]), high
