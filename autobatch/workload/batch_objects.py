"""Objects that know their samples themselves: batches of graphs, TensorDicts.

Invariant: only the object's own functions take samples out of it and put them together.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

__all__ = ["BatchObject", "batch_object"]


@dataclass(frozen=True, slots=True)
class BatchObject:
    """An object with samples.

    Attributes:
        size: how many.
        take: `take(indices)` gives an object of these samples, which may repeat.
    """

    size: int
    take: Callable[[Sequence[int]], Any]


def batch_object(node: Any) -> BatchObject | None:
    """Return how an object's samples are taken, or None where it does not know them.

    >>> batch_object({"x": 1}) is None
    True
    """
    if isinstance(node, (Tensor, type)):
        return None
    if callable(getattr(node, "to_data_list", None)):
        items = node.to_data_list()
        join = type(node).from_data_list
        return BatchObject(len(items), lambda rows: join([items[row] for row in rows]))
    graphs = sys.modules.get("torch_geometric.data")
    if graphs is not None and isinstance(node, graphs.data.BaseData):  # one graph
        return BatchObject(1, lambda rows: graphs.Batch.from_data_list([node for _ in rows]))
    is_tensordict = hasattr(node, "batch_size") and hasattr(node, "batch_dims")
    if is_tensordict and len(node.batch_size):
        return BatchObject(int(node.batch_size[0]), lambda rows: node[list(rows)])
    return None
