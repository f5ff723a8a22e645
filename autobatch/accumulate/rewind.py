"""What a pass over micro-batches changes besides the window's gradients, put back before a repeat.

Invariant: where nothing was split, a pass that is repeated finds buffers, random states and the
gradients of all leaves that it reaches as the first one found them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from autobatch.support.randomness import random_state

__all__ = ["Mark", "Rewind"]

Kept: TypeAlias = "tuple[nn.Module, str, Tensor, Tensor]"
"""A module, the name of a buffer of its, the buffer and a copy of it."""

_SMALL = 4096
"""Elements up to which buffers are copied, whether or not the first window changed them."""


@dataclass(slots=True)
class Mark:
    """A moment to go back to.

    Attributes:
        buffers: copies of the buffers that passes change.
        gradients: those of leaves that the optimizers do not train; with copies, as they are added
            to in place.
        random: sets the random states.
    """

    buffers: list[Kept]
    gradients: list[tuple[Tensor, Tensor | None]]
    random: tuple[Callable[[], None], ...]


class Rewind:
    """Notes what a pass changes, and puts it back.

    Which large buffers a pass changes is learned in the first window, of which all are copied to
    host memory; after that, only those are copied, and the small ones.

    Args:
        model: whose buffers and leaves they are; None where it is not known. Leaves are also found
            in the graph of the first loss.
        trained: what the optimizers hold, whose gradients are dropped instead.
    """

    def __init__(self, model: nn.Module | None, trained: Iterable[Tensor]) -> None:
        self._model = model
        self._known = set(map(id, trained))
        self._others: list[weakref.ref[Tensor]] = []
        for parameter in model.parameters() if model is not None else ():
            self._add(parameter)
        self._has_searched = False
        self._is_learned = False
        self._running: set[tuple[int, str]] = set()  # large ones that passes change

    def begin(self) -> Mark:
        """Mark the beginning of a window."""
        leaves = [leaf() for leaf in self._others]
        gradients = [_kept(leaf) for leaf in leaves if leaf is not None]
        return Mark(self.buffers(), gradients, _random_states())

    def end(self, mark: Mark) -> None:
        """Learn from a whole window which large buffers a pass changes.

        Their values tell, as batch norms write to theirs without counting a change.
        """
        if not self._is_learned:
            self._is_learned = True
            for module, name, _, copy in mark.buffers:
                now = module._buffers.get(name)
                if now is None or not torch.equal(now.detach().cpu(), copy):
                    self._running.add((id(module), name))

    def buffers(self) -> list[Kept]:
        """Return copies of the buffers that passes may change, by the module that has them."""
        if self._model is None:
            return []
        return [
            (module, name, buffer, self._copied(buffer))
            for module in self._model.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None and not is_lazy(buffer) and self._is_copied(module, name, buffer)
        ]

    def _is_copied(self, module: nn.Module, name: str, buffer: Tensor) -> bool:
        is_small = buffer.numel() <= _SMALL
        return is_small or not self._is_learned or (id(module), name) in self._running

    def _copied(self, buffer: Tensor) -> Tensor:
        buffer = buffer.detach()
        return buffer.clone() if self._is_learned else buffer.to("cpu", copy=True)

    def search(self, loss: Tensor, mark: Mark) -> None:
        """Find the leaves that the first of all losses reaches, and add them to the mark."""
        if self._has_searched:
            return
        self._has_searched = True
        for leaf in _leaves_of(loss):
            if self._add(leaf):
                mark.gradients.append(_kept(leaf))

    def restore(self, mark: Mark) -> None:
        """Go back to a mark."""
        self.restore_buffers(mark.buffers)
        for leaf, gradient in mark.gradients:
            leaf.grad = gradient if gradient is None else gradient.clone()
        for put_back in mark.random:
            put_back()

    def restore_buffers(self, kept: Iterable[Kept]) -> None:
        """Put back buffers, those that were replaced too."""
        with torch.no_grad():
            for module, name, buffer, copy in kept:
                module._buffers[name] = buffer
                buffer.copy_(copy)

    def _add(self, leaf: Tensor) -> bool:
        is_new = leaf.requires_grad and id(leaf) not in self._known
        if is_new:
            self._known.add(id(leaf))
            self._others.append(weakref.ref(leaf))
        return is_new


def _kept(leaf: Tensor) -> tuple[Tensor, Tensor | None]:
    return leaf, None if leaf.grad is None else leaf.grad.clone()


def _random_states() -> tuple[Callable[[], None], ...]:
    """Return what puts back all generators, that of the GPU at work included."""
    if not torch.cuda.is_initialized():
        return (random_state(),)
    return random_state(), partial(torch.cuda.set_rng_state, torch.cuda.get_rng_state())


def _leaves_of(loss: Tensor) -> list[Tensor]:
    """Return the leaves to which a backward pass from a loss adds gradients."""
    waiting, seen, found = [loss.grad_fn], set(), []
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(leaf := getattr(node, "variable", None), Tensor):
            found.append(leaf)
        waiting.extend(following for following, _ in node.next_functions)
    return found
