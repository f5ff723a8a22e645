"""Optimizers: how the update runs, and what is kept of each parameter."""

from __future__ import annotations

import importlib.util
from functools import partial

from autobatch.levers.lever import Lever, Option
from autobatch.levers.optimizers import KnownOptimizer, known_optimizer
from autobatch.levers.setup import Setup

__all__ = ["OPTIMIZER"]

_HOW = {
    "foreach": (
        {"foreach": True, "fused": False},
        "Updates all parameters together, op by op: fast, with temporaries of the size of all.",
    ),
    "for-loop": (
        {"foreach": False, "fused": False},
        "Updates one parameter after the other: temporaries of one parameter's size, many launches "
        "of kernels.",
    ),
    "fused": (
        {"foreach": False, "fused": True},
        "Updates all parameters in one kernel, without temporaries.",
    ),
}
"""How one class of torch.optim can run, which arguments say so, and what it does."""

_TRAINER = {
    ("AdamW", "fused"): 'optim="adamw_torch_fused"',
    ("AdamW", "foreach"): 'optim="adamw_torch"',
}

_ADAM = ("lr", "betas", "eps", "weight_decay", "amsgrad")

_EIGHT_BITS = (
    # library, where the class is, what it is called, arguments that it takes, Trainer's name
    ("bitsandbytes", "bitsandbytes.optim", "{}8bit", _ADAM[:4], 'optim="adamw_bnb_8bit"'),
    ("torchao", "torchao.optim", "{}8bit", _ADAM, 'optim="adamw_torch_8bit"'),
)
"""Libraries whose 8-bit optimizers take as much memory; the first that is installed is offered."""


def _options(setup: Setup) -> list[Option]:
    workload = setup.workload
    known = known_optimizer(workload)
    if known is None or workload.window is not None:
        return []
    options = _ways_to_run(known)
    if known.is_pytorchs and known.kind.__name__ in ("Adam", "AdamW") and workload.world_size == 1:
        installed = [row for row in _EIGHT_BITS if importlib.util.find_spec(row[0]) is not None]
        options += [_eight_bits(known, *row) for row in installed[:1]]
    if known.kind.__name__ != "Adafactor":
        options.append(
            _replaced(
                setup,
                known,
                "Adafactor",
                "Keeps a row and a column of second moments for each matrix, and no first moments.",
            )
        )
    if known.kind.__name__ != "SGD":
        options.append(
            _replaced(
                setup,
                known,
                "SGD",
                "Keeps nothing of a parameter; it needs another learning rate.",
                ", lr=1e-3",
            )
        )
    if _may_step_in_backward(setup, known):
        options.append(_in_backward(known))
    return options


def _ways_to_run(known: KnownOptimizer) -> list[Option]:
    """Return the other ways in which the same class can run."""
    if not known.is_pytorchs or not known.takes("foreach"):
        return []
    now = _now(known)
    options = []
    for value, (arguments, what) in _HOW.items():
        changes = {name: on for name, on in arguments.items() if known.takes(name)}
        if value == now or (value == "fused" and not known.takes("fused")):
            continue
        name = known.kind.__name__
        if known.keywords is None:
            code = (
                "groups = [{**group, "
                + ", ".join(f'"{key}": {on}' for key, on in changes.items())
                + "} for group in optimizer.param_groups]\n"
                + "optimizer = type(optimizer)("
                + ", ".join(["groups", *(f"{key}={on}" for key, on in changes.items() if on)])
                + ")"
            )
        else:
            stated = {key: on for key, on in changes.items() if on or value == "for-loop"}
            stated.pop("fused", None) if value == "for-loop" else None
            others = tuple(key for key in known.keywords if key not in ("foreach", "fused"))
            call = known.called(f"torch.optim.{name}", "model.parameters()", others, **stated)
            code = f"import torch\noptimizer = {call}"
        trainer = _TRAINER.get((name, value))
        options.append(
            _option(
                value,
                what + _made_anew(known),
                code,
                trainer,
                changes_numerics=known.has_stepped,
                keeps_state=True,
            )
        )
    return options


def _made_anew(known: KnownOptimizer) -> str:
    """Return what to say of code that makes an optimizer anew, in place of one that has stepped."""
    if not known.has_stepped:
        return ""
    return " The optimizer is made anew, without the state that yours has: load that again."


def _now(known: KnownOptimizer) -> str:
    """Return how an optimizer runs on a card: together, unless it is told otherwise."""
    if known.options.get("fused"):
        return "fused"
    is_off = known.options.get("foreach") is False or known.options.get("differentiable")
    return "for-loop" if is_off else "foreach"


def _eight_bits(
    known: KnownOptimizer,
    library: str,
    module: str,
    name: str,
    taken: tuple[str, ...],
    trainer: str,
) -> Option:
    kind = name.format(known.kind.__name__)
    if known.keywords is None:
        keys = ", ".join(f'"{key}"' for key in ("params", *taken[:4]))
        parameters = "groups"
        head = (
            f"kept = {keys}\n"
            "groups = [{key: group[key] for key in kept} for group in optimizer.param_groups]\n"
        )
    else:
        head, parameters = "", "model.parameters()"
    code = f"from {module} import {kind}\n{head}optimizer = {known.called(kind, parameters, taken)}"
    return _option(
        f"8-bit ({library})",
        "Keeps both moments of large parameters in one byte each, with a scale for each block of "
        "them.",
        code,
        trainer if known.kind.__name__ == "AdamW" else None,
        changes_numerics=True,
    )


def _replaced(
    setup: Setup, known: KnownOptimizer, value: str, what: str, arguments: str = ""
) -> Option:
    """Return the option of another class of torch.optim, over the same parameters."""
    head, parameters = "", "model.parameters()"
    if not known.holds(setup.model):
        head = 'groups = [{"params": group["params"]} for group in optimizer.param_groups]\n'
        parameters = "groups"
    trainer = 'optim="sgd"' if value == "SGD" and not head else None
    code = f"import torch\n{head}optimizer = torch.optim.{value}({parameters}{arguments})"
    return _option(value, what, code, trainer, changes_numerics=True)


def _may_step_in_backward(setup: Setup, known: KnownOptimizer) -> bool:
    """Whether each parameter could be updated as soon as its gradient is there."""
    workload = setup.workload
    return (
        known.is_pytorchs
        and known.kind.__name__ != "LBFGS"
        and workload.clip_norm is None  # the norm of all gradients is known at the end alone
        and workload.autocast != "fp16"  # so is whether one of them overflowed
        and workload.world_size == 1
    )


def _in_backward(known: KnownOptimizer) -> Option:
    if known.keywords is None:
        head = (
            'optimizers = {\n    parameter: type(optimizer)([{**group, "params": [parameter]}])\n'
            '    for group in optimizer.param_groups for parameter in group["params"]\n'
            "    if parameter.requires_grad}\n"
        )
    else:
        call = known.called(
            f"torch.optim.{known.kind.__name__}", "[parameter]", tuple(known.keywords)
        )
        head = (
            f"import torch\noptimizers = {{\n    parameter: {call}\n"
            "    for parameter in model.parameters() if parameter.requires_grad}\n"
        )
    code = (
        f"{head}\ndef update(parameter):\n"
        "    optimizers[parameter].step()\n"
        "    optimizers[parameter].zero_grad()\n\n"
        "for parameter in optimizers:\n"
        "    parameter.register_post_accumulate_grad_hook(update)\n"
        "# leave optimizer.step() and zero_grad() out of the loop"
    )
    return Option(
        lever="optimizer",
        value="in backward",
        what="Updates each parameter as soon as its gradient is there, and drops the gradient: all "
        f"samples of an update have to fit at once, as one micro-batch.{_made_anew(known)}",
        code=code,
        changes_numerics=known.has_stepped,
        apply=partial(_stepping_in_backward, code=code),
        excludes=frozenset(("precision: fp16 autocast", "offload", "sharding")),
    )


def _stepping_in_backward(setup: Setup, *, code: str) -> Setup:
    return setup.with_optimizer(code).having(accumulates=False)


def _option(
    value: str,
    what: str,
    code: str,
    trainer: str | None,
    *,
    changes_numerics: bool = False,
    keeps_state: bool = False,
) -> Option:
    return Option(
        lever="optimizer",
        value=value,
        what=what,
        code=code,
        trainer=trainer,
        changes_numerics=changes_numerics,
        keeps_state=keeps_state,
        apply=partial(Setup.with_optimizer, code=code),
    )


OPTIMIZER = Lever(
    name="optimizer",
    what="Update the parameters another way, or keep less of each.",
    options=_options,
)
