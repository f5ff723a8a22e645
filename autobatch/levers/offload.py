"""What waits in the host's memory while the card does not need it."""

from __future__ import annotations

import importlib.util
from functools import partial

from autobatch.levers.code import ModelCode
from autobatch.levers.lever import Lever, Option
from autobatch.levers.optimizers import known_optimizer
from autobatch.levers.setup import Setup

__all__ = ["OFFLOAD"]

_ACTIVATIONS = """\
from functools import wraps
from torch.autograd.graph import save_on_cpu

def offloaded(plain):
    @wraps(plain)
    def forward(*args, **kwargs):
        with save_on_cpu(pin_memory=True):
            return plain(*args, **kwargs)
    return forward

model.forward = offloaded(model.forward)"""


def _options(setup: Setup) -> list[Option]:
    options = []
    if not setup.has("offload"):
        options.append(
            Option(
                lever="offload",
                value="activations",
                what="What the forward pass keeps is copied to the host, and back for the backward "
                "pass: as slow as the bus to the card.",
                code=_ACTIVATIONS,
                keeps_state=True,
                apply=partial(Setup.changed, change=ModelCode("offload", _ACTIVATIONS)),
            )
        )
    state = _of_optimizer(setup)
    return options if state is None else [*options, state]


def _of_optimizer(setup: Setup) -> Option | None:
    """Return the option whose optimizer updates on the host, where it is possible.

    torchao copies a gradient in the backward pass, so it is not clipped or unscaled afterwards.
    """
    workload = setup.workload
    known = known_optimizer(workload)
    if known is None or known.keywords is None or not known.is_pytorchs:
        return None
    if workload.window is not None or workload.world_size > 1:
        return None
    if workload.clip_norm is not None or workload.autocast == "fp16":
        return None
    if importlib.util.find_spec("torchao") is None:
        return None
    keywords = {key: on for key, on in known.keywords.items() if key not in ("foreach", "fused")}
    arguments = "".join(f", {key}={value!r}" for key, value in keywords.items())
    code = (
        "import torch\nfrom torchao.optim import CPUOffloadOptimizer\n"
        "optimizer = CPUOffloadOptimizer(\n"
        "    [parameter for parameter in model.parameters() if parameter.requires_grad],\n"
        f"    torch.optim.{known.kind.__name__}{arguments})"
    )
    return Option(
        lever="offload",
        value="optimizer state",
        what="The state of the optimizer is in the host's memory, and the update runs there.",
        code=code,
        apply=partial(Setup.with_optimizer, code=code),
        excludes=frozenset(("optimizer", "sharding", "precision: fp16 autocast")),
    )


OFFLOAD = Lever(
    name="offload",
    what="Keep in the host's memory what the card does not need at the time.",
    options=_options,
)
