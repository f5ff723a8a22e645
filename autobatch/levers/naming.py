"""How code names the modules of a model: `*model.layers` for the members of a container.

Invariant: the expressions name exactly the modules that were given, in the order that they were.
"""

from __future__ import annotations

from itertools import groupby

from torch import nn

from autobatch.workload.blocks import repeated_blocks

__all__ = ["blocks_in_order", "expression_of", "path_of"]


def blocks_in_order(model: nn.Module) -> dict[str, nn.Module]:
    """Return the repeated blocks of a model by name, outermost ones alone, in the model's order.

    >>> layers = nn.ModuleList(nn.Sequential(nn.Linear(2, 2)) for _ in range(3))
    >>> list(blocks_in_order(nn.ModuleDict({"layers": layers})))
    ['layers.0', 'layers.1', 'layers.2']
    """
    blocks = set(map(id, repeated_blocks(model)))
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        is_inner = any(name.startswith(f"{outer}.") for outer in found)
        if id(module) in blocks and not is_inner:
            found[name] = module
    return found


def path_of(name: str) -> str:
    """Return an expression for the module of a name.

    >>> path_of("transformer.h"), path_of("0.body"), path_of("")
    ('model.transformer.h', 'model.get_submodule("0.body")', 'model')
    """
    if not name:
        return "model"
    if all(part.isidentifier() for part in name.split(".")):
        return f"model.{name}"
    return f'model.get_submodule("{name}")'


def expression_of(model: nn.Module, modules: dict[str, nn.Module]) -> str:
    """Return an expression for a list of modules of a model, by name.

    >>> model = nn.ModuleDict({"body": nn.ModuleList(nn.Linear(1, 1) for _ in range(3))})
    >>> names = {f"body.{number}": part for number, part in enumerate(model["body"])}
    >>> expression_of(model, names)
    '[*model.body]'
    >>> del names["body.1"]
    >>> expression_of(model, names)
    '[model.body[0], model.body[2]]'
    """
    parts: list[str] = []
    for parent, names in groupby(modules, key=lambda name: name.rpartition(".")[0]):
        children = [name.rpartition(".")[2] for name in names]
        container = model.get_submodule(parent)
        is_list = isinstance(container, (nn.ModuleList, nn.Sequential))
        if is_list and children == [name for name, _ in container.named_children()]:
            parts.append(f"*{path_of(parent)}")
            continue
        for child in children:
            if is_list and child.isdecimal():
                parts.append(f"{path_of(parent)}[{child}]")
            else:
                parts.append(path_of(f"{parent}.{child}" if parent else child))
    return f"[{', '.join(parts)}]"
