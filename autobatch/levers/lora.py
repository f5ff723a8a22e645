"""LoRA: the model is frozen, and two thin matrices beside some of its layers are trained (peft)."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import nn

from autobatch.errors import UsageError
from autobatch.levers.code import ModelCode, OptimizerCode
from autobatch.levers.lever import Lever, Option
from autobatch.levers.naming import blocks_in_order
from autobatch.levers.optimizers import known_optimizer
from autobatch.levers.setup import Setup
from autobatch.workload.optimizers import is_optimizer

__all__ = ["LORA", "lora"]

_SHOWN = 6
"""So many layers are named in full."""

_SAME_OPTIMIZER = """\
trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
optimizer = type(optimizer)([{**optimizer.param_groups[0], "params": trained}])"""


def lora(*, ranks: Sequence[int] = (16,), modules: Sequence[str] | None = None) -> Lever:
    """Return the lever of LoRA for ranks and layers of your own choice.

    Args:
        ranks: of the matrices, one option each.
        modules: last parts of the names of linear layers that get them, such as "q_proj"; None for
            those of attention that peft takes by itself, and for all linear layers of the blocks.

    Raises:
        UsageError: a rank is no positive whole number.

    >>> lora(ranks=[8, 64], modules=["q_proj", "v_proj"]).name
    'lora'
    """
    for rank in ranks:
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise UsageError(f"a rank of LoRA is {rank!r}: use a positive whole number")
    chosen = None if modules is None else tuple(modules)
    return Lever(
        name="lora",
        what="Freeze the model and train thin matrices beside its linear layers.",
        options=partial(_options, ranks=tuple(ranks), modules=chosen),
    )


def _options(
    setup: Setup, *, ranks: Sequence[int], modules: tuple[str, ...] | None
) -> list[Option]:
    model = setup.model
    layers = _linear_layers(model)
    if importlib.util.find_spec("peft") is None or hasattr(model, "peft_config") or not layers:
        return []
    if setup.has("lora") or not _can_be_made_anew(setup):
        return []
    if modules is None:
        choices = {"attention": _of_attention(model, layers), "all linear": _of_blocks(model)}
        if choices["attention"] == choices["all linear"]:
            del choices["attention"]
    else:
        choices = {", ".join(modules): modules}
    return [
        _option(setup, rank, name, chosen)
        for name, chosen in choices.items()
        if set(chosen) & set(layers)
        for rank in ranks
    ]


def _option(setup: Setup, rank: int, name: str, modules: Sequence[str]) -> Option:
    targets = _targets(setup.model, modules)
    transposed = ", fan_in_fan_out=True" if _is_transposed(setup.model, modules) else ""
    change = (
        "from peft import LoraConfig, get_peft_model\n"
        f"config = LoraConfig(r={rank}, target_modules={targets}{transposed})\n"
        "model = get_peft_model(model, config)"
    )
    if setup.has("checkpointing"):
        change = f"# before activation checkpointing is applied\n{change}"
    is_given = is_optimizer(setup.workload.optimizer)
    return Option(
        lever="lora",
        value=f"rank {rank}, {name}",
        what=f"Freezes the model and trains matrices of rank {rank} beside "
        f"{_said(setup.model, modules)}: gradients and optimizer state are those of the matrices.",
        code=f"{change}\n{_SAME_OPTIMIZER}" if is_given else change,
        changes_numerics=True,
        apply=partial(_adapted, change=change, is_given=is_given),
    )


def _adapted(setup: Setup, *, change: str, is_given: bool) -> Setup:
    # peft adapts no layer that is wrapped already
    setup = setup.changed_below("checkpointing", ModelCode("lora", change))
    if is_given:
        return setup.having(optimizer=OptimizerCode(_SAME_OPTIMIZER, setup.workload.optimizer))
    return setup


def _can_be_made_anew(setup: Setup) -> bool:
    """Whether the optimizer is made of what will be trained, or can be."""
    given = setup.workload.optimizer
    if setup.workload.window is not None or isinstance(given, (list, tuple, dict)):
        return False
    if not is_optimizer(given):
        return True  # a class or a function gets the parameters that are trained
    known = known_optimizer(setup.workload)
    return known is not None and known.is_pytorchs and known.groups == 1


def _linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return linear layers by the last part of their names; of layers of one name, the last."""
    return {name.rpartition(".")[2]: module for name, module in _by_full_name(model).items()}


def _by_full_name(model: nn.Module) -> dict[str, nn.Module]:
    """Return linear layers that can be adapted, by their full names."""
    inside_attention = {
        id(module.out_proj)  # its weight is read, and the layer never called
        for module in model.modules()
        if isinstance(module, nn.MultiheadAttention)
    }
    return {
        name: module
        for name, module in model.named_modules()
        if name
        and (type(module) is nn.Linear or _is_conv1d(module))
        and id(module) not in inside_attention
    }


def _targets(model: nn.Module, modules: Sequence[str]) -> str:
    r"""Return how code names layers for peft, which takes all modules of a name.

    Names that other modules have, too, such as the numbers of a Sequential, are given in full, as
    an expression that peft matches with whole names.

    >>> body = nn.Sequential(*(nn.Sequential(nn.Linear(2, 2), nn.ReLU()) for _ in range(2)))
    >>> _targets(nn.ModuleDict({"body": body}), ["0"])
    'r"body\\.\\d+\\.0"'
    >>> _targets(nn.ModuleDict({"head": nn.Linear(2, 2)}), ["head"])
    '["head"]'
    """
    chosen, adaptable = set(modules), _by_full_name(model)
    named = [name for name, _ in model.named_modules() if name.rpartition(".")[2] in chosen]
    wanted = [name for name in named if name in adaptable]
    if wanted == named:
        return f"[{', '.join(_quoted(module) for module in modules)}]"
    short = "|".join(dict.fromkeys(map(_any_numbers, wanted)))
    exact = "|".join(map(re.escape, wanted))
    is_exact = wanted == [name for name in named if re.fullmatch(short, name)]
    return f"r{_quoted(short if is_exact else exact)}"


def _said(model: nn.Module, modules: Sequence[str]) -> str:
    """Return how a reader knows layers: by last names, or in full where these are numbers.

    >>> _said(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)), ["0", "2"])
    'layers 0 and 2'
    """
    full = [name for name in _by_full_name(model) if name.rpartition(".")[2] in modules]
    if not any(name.isdecimal() for name in modules):
        return ", ".join(modules)
    shown = [*full[:_SHOWN], *([f"{len(full) - _SHOWN} more"] if len(full) > _SHOWN else [])]
    said = " and ".join(filter(None, (", ".join(shown[:-1]), shown[-1])))
    return f"layers {said}" if len(full) > 1 else f"layer {said}"


def _any_numbers(name: str) -> str:
    """Return an expression for a name and those that differ in the numbers of its containers."""
    *parents, last = name.split(".")
    parts = [r"\d+" if part.isdecimal() else re.escape(part) for part in parents]
    return r"\.".join((*parts, re.escape(last)))


def _quoted(text: str) -> str:
    return f'"{text}"'


def _of_blocks(model: nn.Module) -> tuple[str, ...]:
    """Return the names of linear layers in the blocks, or of all where there are no blocks."""
    blocks = blocks_in_order(model).values()
    names = {name: None for block in blocks for name in _linear_layers(block)}
    return tuple(names or _linear_layers(model))


def _of_attention(model: nn.Module, layers: dict[str, nn.Module]) -> tuple[str, ...]:
    """Return the layers that peft adapts in a model of this kind unless it is told otherwise."""
    from peft.utils import constants

    kind = getattr(getattr(model, "config", None), "model_type", None)
    table: Any = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    known = [name.rpartition(".")[2] for name in table.get(kind, ())]
    return tuple(name for name in dict.fromkeys(known) if name in layers)


def _is_conv1d(module: nn.Module) -> bool:
    """Whether a layer is Transformers' linear layer with a transposed weight."""
    return type(module).__name__ == "Conv1D" and "transformers" in type(module).__module__


def _is_transposed(model: nn.Module, modules: Sequence[str]) -> bool:
    layers = _linear_layers(model)
    return all(_is_conv1d(layers[name]) for name in modules if name in layers)


LORA = lora()
