"""The steps of all optimizers in a run, and what they allocate and keep: optimizer state.

Invariant: what the closure of a step allocates is none, nor is what the user's own hooks do.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from torch.optim.optimizer import register_optimizer_step_pre_hook

from autobatch.memory.trace import Category
from autobatch.support.torch_private import current_graph_task_id
from autobatch.workload.optimizers import names_of, parameters_of
from autobatch.workload.step_calls import paused_in, watch_steps

__all__ = ["Steps"]


class _Claims(Protocol):
    def claim(self, category: Category | None) -> None: ...

    def keep(self) -> None: ...


class Steps:
    """Watches optimizers, and tells a recorder when they step."""

    def __init__(
        self, recorder: _Claims, begin: Callable[[], None], ended: Callable[[Any], None]
    ) -> None:
        """Watch for a recorder.

        Args:
            recorder: told of what is allocated in steps.
            begin: called before a step outside of a backward pass.
            ended: called with the optimizer after each step, before its gradients can be dropped.
        """
        self._recorder = recorder
        self._begin = begin
        self._ended = ended
        self._running: list[int] = []  # ids of optimizers: wrappers step others inside
        self._watched: dict[int, Any] = {}
        self._stepped: dict[int, Any] = {}
        self._in_hooks: dict[int, Any] = {}

    def watch(self, optimizer: Any) -> None:
        """Notice the steps of an optimizer."""
        if id(optimizer) not in self._watched:
            self._watched[id(optimizer)] = optimizer
            watch_steps(optimizer, self._before, self._after)

    @contextlib.contextmanager
    def of_others(self) -> Iterator[None]:
        """Watch the optimizers, too, that the user's code makes in the block."""
        thread = threading.get_ident()

        def met(optimizer: Any, *_: Any) -> None:
            if threading.get_ident() == thread:
                self.watch(optimizer)

        handle = register_optimizer_step_pre_hook(met)
        try:
            yield
        finally:
            handle.remove()

    def _before(self, optimizer: Any, args: Any, kwargs: Any) -> Any:
        self._stepped[id(optimizer)] = optimizer
        self._left(optimizer)  # its last step may have raised
        if current_graph_task_id() != -1:
            self._in_hooks[id(optimizer)] = optimizer
        elif not self._running:
            self._begin()
        self._running.append(id(optimizer))
        self._recorder.claim("optimizer_state")
        return paused_in(args, kwargs, self._paused)

    def _after(self, optimizer: Any, *_: Any) -> None:
        self._left(optimizer)
        if not self._running:
            self._recorder.claim(None)
            self._recorder.keep()
        self._ended(optimizer)

    def _left(self, optimizer: Any) -> None:
        if id(optimizer) in self._running:
            del self._running[self._running.index(id(optimizer)) :]

    @contextlib.contextmanager
    def _paused(self) -> Iterator[None]:
        running, self._running = self._running, []
        self._recorder.claim(None)
        try:
            yield
        finally:
            self._running = running
            self._recorder.claim("optimizer_state")
        if current_graph_task_id() == -1:
            self._begin()

    def notes(self, optimizers: Sequence[Any]) -> list[str]:
        """Say which of the optimizers that should have stepped never did.

        Those whose parameters are stepped by others in hooks of the backward pass need not.
        """
        by_hooks = set(map(id, parameters_of(self._in_hooks.values())))
        silent = [
            one
            for one in optimizers
            if id(one) not in self._stepped
            and not all(id(parameter) in by_hooks for parameter in parameters_of([one]))
        ]
        if not silent:
            return []
        did = names_of(self._stepped.values())
        others = f"; {did} did" if did else ""
        return [
            f"{names_of(silent)} never made a step{others} (in fp16, gradients that "
            "are not finite skip it): its state may be missing from the account"
        ]
