"""The training loop of a plan, as Python to paste."""

from __future__ import annotations

from collections.abc import Sequence

from autobatch.records.plan_record import PlanRecord

__all__ = ["training_loop"]

_AUTOCAST = {"bf16": "torch.bfloat16", "fp16": "torch.float16"}


def training_loop(plan: PlanRecord) -> str:
    """Write the training loop of the plan as Python to paste, in plain PyTorch.

    It expects `model`, `optimizer`, `dataset`, `epochs` and, where the loss is the user's own,
    `loss_fn(model, batch)` returning a mean over samples. The gradient of each window equals that
    of its effective batch, for uniform and ragged windows, on one GPU, under
    DistributedDataParallel or FSDP2. An incomplete last window of an epoch is left out.
    """
    setup = ["import torch", "from torch.utils.data import DataLoader"]
    if plan.world_size > 1:
        wraps = not plan.is_sharded
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


def _uniform_epoch(plan: PlanRecord) -> list[str]:
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


def _ragged_epoch(plan: PlanRecord) -> list[str]:
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
    step = "step, size" if world > 1 and steps > 1 and not plan.is_sharded else "size"
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


def _micro_batch(plan: PlanRecord, weight: str) -> list[str]:
    body = _forward_backward(plan, weight)
    if plan.world_size == 1 or plan.accumulation_steps == 1 or plan.is_sharded:
        return body
    return [
        f"last = step == {plan.accumulation_steps - 1}  # gradients are reduced once per window",
        "with nullcontext() if last else model.no_sync():",
        *_indent(body, 4),
    ]


def _forward_backward(plan: PlanRecord, weight: str) -> list[str]:
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


def _loss_call(plan: PlanRecord) -> str:
    if plan.model.loss == "output.loss":
        return "model(**batch).loss"
    if plan.model.loss == "mean of output.loss":
        return "model(**batch).loss.mean()"
    if plan.model.loss == "scalar output":
        return "model(batch)"
    return "loss_fn(model, batch)"


def _update(plan: PlanRecord) -> list[str]:
    scaled = plan.model.autocast == "fp16"
    clip = [f"torch.nn.utils.clip_grad_norm_(model.parameters(), {plan.model.clip_norm})"]
    lines = ["scaler.unscale_(optimizer)"] if scaled and plan.model.clip_norm is not None else []
    lines += clip if plan.model.clip_norm is not None else []
    lines += ["scaler.step(optimizer)", "scaler.update()"] if scaled else ["optimizer.step()"]
    return [*lines, "optimizer.zero_grad()"]


def _indent(lines: Sequence[str], width: int) -> list[str]:
    return [" " * width + line if line else line for line in lines]
