"""Which modules of a model are its repeated blocks: what FSDP2 shards and checkpoints recompute."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from torch import nn

__all__ = ["repeated_blocks"]


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the modules that FSDP2 usually shards one by one, inner ones first.

    In a transformers model these are the modules of the classes in `_no_split_modules`. In others
    they are the members of each `ModuleList`, and those members of a `Sequential` that share a
    class and hold other modules. Where a Sequential makes up most of such a member, its members
    take the member's place: the stages of an image model hold their blocks in one. If there are
    none, they are the outermost modules of one class that share a parent. A block that shares a
    parameter with the rest of the model is left to the root, as FSDP2 demands.
    """
    named = {
        name
        for module in model.modules()
        for name in getattr(module, "_no_split_modules", None) or ()
    }
    if named:
        blocks = [
            module
            for module in _inner_first(model)
            if type(module).__name__ in named and module is not model
        ]
    else:
        blocks = [block for block, _ in _stacked(model)] or _side_by_side(model)
    everywhere = Counter(map(id, _slots(model)))
    return [
        block
        for block in blocks
        if (within := Counter(map(id, _slots(block))))
        and all(everywhere[key] == count for key, count in within.items())
    ]


def _inner_first(module: nn.Module) -> Iterator[nn.Module]:
    """Yield a module's descendants before the module, each once."""
    return iter(reversed(list(module.modules())))


def _slots(module: nn.Module) -> list[nn.Parameter]:
    """Return a module's parameters, as often as they are in it."""
    return [parameter for _, parameter in module.named_parameters(remove_duplicate=False)]


def _elements(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _stacked(module: nn.Module) -> list[tuple[nn.Module, bool]]:
    """Return the members of ModuleLists and Sequentials; of each, whether it is in the latter."""
    is_sequential = isinstance(module, nn.Sequential)
    if is_sequential:
        members = _alike(module)
    elif isinstance(module, nn.ModuleList):
        members = _trained(module)
    else:
        members = []
    found: list[tuple[nn.Module, bool]] = []
    for child in _trained(module):
        inner = _stacked(child)
        in_order = sum(_elements(block) for block, is_in_order in inner if is_in_order)
        is_block = len(members) > 1 and child in members and 2 * in_order <= _elements(child)
        found += [(child, is_sequential)] if is_block and _runs(child) else inner
    return found


def _side_by_side(model: nn.Module) -> list[nn.Module]:
    """Return the outermost modules of one class that share a parent."""
    level = [model]
    while level:
        for module in level:
            if found := _alike(module):
                return found
        level = [child for module in level for child in module.children()]
    return []


def _trained(module: nn.Module) -> list[nn.Module]:
    """Return the children that have parameters."""
    return [child for child in module.children() if any(True for _ in child.parameters())]


def _alike(module: nn.Module) -> list[nn.Module]:
    """Return the children that have parameters, modules inside, and a sibling of their class."""
    children = [child for child in _trained(module) if _runs(child) and any(child.children())]
    kinds = Counter(map(type, children))
    return [child for child in children if kinds[type(child)] > 1]


def _runs(module: nn.Module) -> bool:
    """Whether a module can be called; `fully_shard` takes no mere containers."""
    return type(module).forward is not nn.Module.forward
