"""How many parameters a model has, how many of them learn, and which parts do not.

Invariant: the model is only looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import nn

from autobatch.support.torch_private import BatchNorm

__all__ = ["ModelCounts", "counts_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCounts:
    """What is counted of a model; the fields are those of `ModelFacts`."""

    parameters: int
    trainable_parameters: int
    batchnorm_layers: int
    frozen: tuple[str, ...]


def counts_of(
    model: nn.Module, name_of: Callable[[nn.Module, str], str] | None = None
) -> ModelCounts:
    """Count the parameters of a model.

    Args:
        model: to look at.
        name_of: gives the name of a module and its path; the path itself if None.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    >>> counts_of(model.requires_grad_(False)).frozen
    ('0', '1')
    """
    parameters = list(model.parameters())
    named = name_of or _path
    return ModelCounts(
        parameters=sum(p.numel() for p in parameters),
        trainable_parameters=sum(p.numel() for p in parameters if p.requires_grad),
        batchnorm_layers=sum(isinstance(m, BatchNorm) for m in model.modules()),
        frozen=tuple(named(part, path) for path, part in _frozen(model)),
    )


def _path(_: nn.Module, path: str) -> str:
    return path


def _frozen(model: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield the outermost modules that have parameters of which none learns, with their paths."""
    for name, child in model.named_children():
        inner = f"{path}.{name}" if path else name
        learns = {parameter.requires_grad for parameter in child.parameters()}
        if learns == {False}:
            yield inner, child
        elif learns:
            yield from _frozen(child, inner)
