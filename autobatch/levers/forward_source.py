"""What the source of a model's forward pass says of its loss.

Invariant: a model counts as plain only where its source shows it; one without source does not.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from typing import Any

from torch import nn

__all__ = ["has_plain_loss"]


def has_plain_loss(model: nn.Module) -> bool:
    """Return whether a Transformers model gives its head's logits to the usual loss, and no more.

    >>> has_plain_loss(nn.Linear(2, 2))
    False
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    loss: Any = getattr(model, "loss_function", None)
    if head is None or getattr(loss, "__name__", None) != "ForCausalLMLoss":
        return False
    names = [name for name, child in model.named_children() if child is head]
    kind: Any = type(model)
    return bool(names) and _is_plain(kind, names[0])


@functools.cache
def _is_plain(kind: Any, head: str) -> bool:
    """Whether `forward` has the form `logits = self.head(…); loss = self.loss_function(logits…)`.

    Neither name is bound a second time (but `loss = None`), and the logits are read by nothing but
    the loss and what is returned.
    """
    try:
        source = textwrap.dedent(inspect.getsource(inspect.unwrap(kind.forward)))
        tree = ast.parse(source)
    except (OSError, TypeError, SyntaxError):
        return False
    made = [node for node in ast.walk(tree) if _is_call_of_self(_value(node), head)]
    lost = [node for node in ast.walk(tree) if _is_call_of_self(_value(node), "loss_function")]
    if len(made) != 1 or len(lost) != 1:
        return False
    logits, loss = _target(made[0]), _target(lost[0])
    if logits is None or loss is None:
        return False
    allowed = {id(node) for node in ast.walk(lost[0])}
    for node in ast.walk(tree):
        if isinstance(node, ast.Return):
            allowed.update(id(part) for part in ast.walk(node))
    for node in ast.walk(tree):
        if not isinstance(node, ast.Name) or node.id not in (logits, loss):
            continue
        if isinstance(node.ctx, ast.Store):
            if id(node) not in _stores(made[0], lost[0]) and not _is_none(tree, node):
                return False
        elif node.id == logits and id(node) not in allowed:
            return False
    return True


def _value(node: ast.AST) -> ast.expr | None:
    return node.value if isinstance(node, ast.Assign) else None


def _is_call_of_self(node: ast.expr | None, name: str) -> bool:
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == name
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "self"
    )


def _target(node: ast.AST) -> str | None:
    targets = node.targets if isinstance(node, ast.Assign) else []
    if len(targets) == 1 and isinstance(targets[0], ast.Name):
        return targets[0].id
    return None


def _stores(*nodes: ast.AST) -> set[int]:
    return {id(target) for node in nodes if isinstance(node, ast.Assign) for target in node.targets}


def _is_none(tree: ast.AST, name: ast.Name) -> bool:
    """Whether a name is bound to None, in an assignment of that alone."""
    return any(
        isinstance(node, ast.Assign)
        and name in node.targets
        and isinstance(node.value, ast.Constant)
        and node.value.value is None
        for node in ast.walk(tree)
    )
