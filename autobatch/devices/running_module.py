"""Which module of the user's model is at work: in its forward pass, or in its backward pass.

Forward passes are seen by the calls of modules. In a backward pass, PyTorch's autograd nodes tell:
they are numbered in the order in which forward passes made them, so the numbers at which modules
begin and end say which module made a node.

Invariant: modules are called with the same arguments and hooks, and nothing of theirs is held.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from autobatch.support.patching import patched
from autobatch.support.torch_private import current_autograd_node, next_sequence_number

__all__ = ["RunningModule"]

_WRAPPERS = frozenset(
    {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_flat_param"}
)
"""What wrappers that levers, compilers and shardings put into a model add to paths."""


class RunningModule:
    """Tells the module that is at work, by its name in `model.named_modules()`.

    A module outside of the model, such as a loss or a teacher, is called by its class in
    parentheses, and a part of it by the path below that: `(Teacher).layers.0`. One that a module of
    the model makes for a call belongs to that module.

    Attributes:
        current: the innermost module whose forward pass runs; None where none does.
        announce: gives a context in which a module of this name runs; None for none.
        above_calls: of each call of a module that runs in this thread, the line of the user's code
            that leads to it, for who finds lines to fill in; None where nobody has asked for it.
    """

    def __init__(self, *, follows: bool = True) -> None:
        """Know no module yet.

        Without `follows`, calls are left alone: the owners of tensors are all that is known.
        """
        self._follows = follows
        self._names: dict[int, str] = {}
        self._others: dict[int, tuple[weakref.ref[nn.Module], str]] = {}
        self._owners: dict[int, str] = {}
        self.current: str | None = None
        self.announce: Callable[[str], AbstractContextManager[Any]] | None = None
        self.above_calls: list[str | None] = []
        self._numbers: list[int] = []  # of autograd nodes, from which on ...
        self._made_by: list[str] = []  # ... this module makes them
        self._is_followed = False

    def learn(self, model: nn.Module) -> None:
        """Learn the names of a model's modules, and which of them own its tensors.

        What is known already keeps its name; what was added to the model since, as adapters are, is
        called by its place below what is known, without what wrappers add. The model has to stay
        alive.
        """
        names: dict[str, str] = {}  # by path
        for path, module in model.named_modules():
            parent, _, own = path.rpartition(".")
            above = names.get(parent, "")
            place = above if own in _WRAPPERS else f"{above}.{own}" if above else own
            name = names[path] = self._names.setdefault(id(module), place)
            for held in (module._parameters, module._buffers):
                for tensor in held.values():
                    if tensor is not None:
                        self._owners.setdefault(id(tensor), name)

    def call(self, module: nn.Module, name: str) -> None:
        """Call a module by this name, unless it has one."""
        self._names.setdefault(id(module), name)

    def name_of(self, module: nn.Module, path: str) -> str:
        """Return the name of a module; its path where it is not known."""
        return self._names.get(id(module), path)

    def owner(self, tensor: Any) -> str | None:
        """Return the name of the first module that owns a parameter or buffer, if one does."""
        return self._owners.get(id(tensor))

    @contextlib.contextmanager
    def followed(self) -> Iterator[None]:
        """Follow the calls of modules in the block."""
        if not self._follows:
            yield
            return
        original = nn.Module.__call__
        thread = threading.get_ident()
        names, note, above = self._names, self._note, self.above_calls

        def called(module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
            is_here = threading.get_ident() == thread
            name = names.get(id(module))
            if name is None:
                if not is_here:
                    return original(module, *args, **kwargs)
                name = self._foreign(module)
            before = self.current
            if is_here:
                above.append(None)
            if name is not before:
                self.current = name
                note(next_sequence_number(), name)
            try:
                if self.announce is None or name is before:
                    return original(module, *args, **kwargs)
                with self.announce(name):
                    return original(module, *args, **kwargs)
            finally:
                if is_here:
                    above.pop()
                if name is not before:
                    self.current = before
                    note(next_sequence_number(), before or "")

        with patched(nn.Module, __call__=called):
            self._is_followed = True
            try:
                yield
            finally:
                self._is_followed = False
                self.current = None

    def _note(self, number: int, name: str) -> None:
        """Remember which module makes autograd nodes from a number on."""
        numbers = self._numbers
        if numbers and numbers[-1] >= number:
            self._made_by[-1] = name  # no node was made in between
        else:
            numbers.append(number)
            self._made_by.append(name)

    def _foreign(self, module: nn.Module) -> str:
        """Return the name of a module that is not the model's."""
        known = self._others.get(id(module))
        if known is not None and known[0]() is module:
            return known[1]
        if self.current is not None:
            return self.current
        root = f"({type(module).__name__})"
        for path, part in module.named_modules():
            if id(part) not in self._names:
                self._others[id(part)] = weakref.ref(part), f"{root}.{path}" if path else root
        return root

    def name(self) -> str:
        """Return the name of the module at work; empty for the model itself, and for none."""
        if self.current is not None:
            return self.current  # also a checkpoint's second forward pass
        if not self._is_followed:
            return ""
        node: Any = current_autograd_node()
        if node is None:
            return ""
        number = node._sequence_nr()
        if number > _LARGEST:  # it adds up a parameter's gradient
            return self._owners.get(id(node.variable), "")
        return self.maker_of(number)

    def maker_of(self, number: int) -> str:
        """Return the name of the module that made the autograd node of a number."""
        place = bisect_right(self._numbers, number) if 0 <= number <= _LARGEST else 0
        return self._made_by[place - 1] if place else ""

    def stop(self) -> None:
        """Follow no calls from the next `followed` on; what is known stays known."""
        self._follows = False


_LARGEST = 1 << 62
"""Nodes that add up gradients have the largest number, so that they run as soon as they can."""
