"""Optimizers of packages, on a small Llama: is their state what the papers say?"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from autobatch.workload.sample import batch_builder
from autobatch.workload.workload import Workload
from reports.zoo.entries import Step, step, workload
from reports.zoo.workloads.parts import llama, tokens

_SIZES = {"num_hidden_layers": 2}


def _with(make: Any, **options: Any) -> Step:
    model = llama(**_SIZES)
    ids = tokens(2, 128)
    sample = {"input_ids": ids, "labels": ids}
    return step(model, target=256, sample=sample, optimizer=make(model), **options)


@workload("bitsandbytes", "transformers")
def adamw_8bit() -> Step:
    """AdamW of bitsandbytes with 8-bit state."""
    import bitsandbytes as bnb

    return _with(
        lambda model: bnb.optim.AdamW8bit(model.parameters()),
        on_cpu="bitsandbytes keeps 8-bit state on a GPU alone",
        state="large tensors in 8 bits, small ones in 32",
    )


@workload("torchao", "transformers")
def adamw_8bit_torchao() -> Step:
    """AdamW of torchao with 8-bit state, a tensor subclass."""
    from torchao.optim import AdamW8bit

    return _with(lambda model: AdamW8bit(model.parameters()))


@workload("pytorch_optimizer", "transformers")
def soap() -> Step:
    """SOAP of pytorch-optimizer, with preconditioners in lists."""
    from pytorch_optimizer import SOAP

    return _with(lambda model: SOAP(model.parameters(), max_precondition_dim=512))


@workload("pytorch_optimizer", "transformers")
def lookahead() -> Step:
    """Lookahead of pytorch-optimizer around AdamW."""
    from pytorch_optimizer import Lookahead

    return _with(lambda model: Lookahead(torch.optim.AdamW(model.parameters())))


@workload("pytorch_optimizer", "transformers")
def came() -> Step:
    """CAME of pytorch-optimizer, factored."""
    from pytorch_optimizer import CAME

    return _with(lambda model: CAME(model.parameters()))


@workload("pytorch_optimizer", "transformers")
def adan() -> Step:
    """Adan of pytorch-optimizer, with three moments."""
    from pytorch_optimizer import Adan

    return _with(lambda model: Adan(model.parameters()))


@workload("prodigyopt", "transformers")
def prodigy() -> Step:
    """Prodigy, which reads norms as it steps."""
    from prodigyopt import Prodigy

    return _with(lambda model: Prodigy(model.parameters()))


@workload("schedulefree", "transformers")
def schedule_free() -> Step:
    """Schedule-free AdamW in its train mode."""
    import schedulefree

    def make(model: nn.Module) -> Any:
        optimizer = schedulefree.AdamWScheduleFree(model.parameters())
        optimizer.train()
        return optimizer

    return _with(make)


@workload("lion-pytorch", "transformers")
def lion() -> Step:
    """Lion: one moment."""
    from lion_pytorch import Lion

    return _with(lambda model: Lion(model.parameters(), lr=1e-4))


@workload("galore-torch", "transformers")
def galore() -> Step:
    """GaLore: moments in a projected space."""
    from galore_torch import GaLoreAdamW

    def make(model: nn.Module) -> Any:
        wide = [p for n, p in model.named_parameters() if p.dim() == 2 and "proj" in n]
        others = [p for n, p in model.named_parameters() if p.dim() != 2 or "proj" not in n]
        galore = {"rank": 64, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
        return GaLoreAdamW([{"params": others}, {"params": wide, **galore}], lr=0.01)

    return _with(make)


@workload("heavyball", "transformers")
def heavyball() -> Step:
    """AdamW of heavyball, which compiles its update."""
    import heavyball

    return _with(lambda model: heavyball.AdamW(model.parameters(), lr=1e-3))


@workload("transformers")
def muon_and_adamw() -> Step:
    """PyTorch's Muon for matrices and AdamW for the rest, as a list."""

    def make(model: nn.Module) -> Any:
        inner = [p for n, p in model.named_parameters() if p.dim() == 2 and "proj" in n]
        others = [p for n, p in model.named_parameters() if p.dim() != 2 or "proj" not in n]
        return [torch.optim.Muon(inner), torch.optim.AdamW(others)]

    model = llama(**_SIZES)
    ids = tokens(2, 128)
    inner = sum(p.numel() for n, p in model.named_parameters() if p.dim() == 2 and "proj" in n)
    total = sum(p.numel() for p in model.parameters())
    return step(
        model,
        target=256,
        sample={"input_ids": ids, "labels": ids},
        optimizer=make(model),
        state=(inner + 2 * (total - inner)) / total,
    )


@workload("transformers")
def lbfgs() -> Step:
    """L-BFGS with its closure, in a window."""
    model = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 1))
    optimizer = torch.optim.LBFGS(model.parameters(), history_size=4, max_iter=4)

    def window(model: nn.Module, optimizer: Any, batches: Any) -> None:
        kept = list(batches)

        def closure() -> Any:
            optimizer.zero_grad()
            loss = sum(nn.functional.mse_loss(model(x), y) for x, y in kept)
            loss.backward()
            return loss

        optimizer.step(closure)

    batch = batch_builder((torch.randn(8, 64), torch.randn(8, 1)))
    return step(
        Workload(model=model, batch=batch, window=window, optimizer=optimizer),
        target=1024,
        state="how many pairs are kept depends on values",
        on_cpu="the closure runs as often as values ask for",
    )


@workload("transformers")
def adamw_in_hooks() -> Step:
    """AdamW fused into the backward pass: an optimizer for each parameter in its hook."""
    model = llama(**_SIZES)
    held = {p: torch.optim.AdamW([p], foreach=False) for p in model.parameters()}

    def update(parameter: Any) -> None:
        held[parameter].step()
        held[parameter].zero_grad()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(update)

    def window(model: nn.Module, optimizer: Any, batches: Any) -> None:
        for batch in batches:
            model(**batch).loss.backward()

    ids = tokens(2, 128)
    made = Workload(
        model=model,
        batch=batch_builder({"input_ids": ids, "labels": ids}),
        window=window,
        optimizer=torch.optim.SGD(model.parameters()),
    )
    return step(made, target=64, state=2.0)
