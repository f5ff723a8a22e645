"""What else touches gradients and parameters while a window runs: nothing, or the window raises.

Invariant: between the first backward pass of a window and the end of its last micro-batch, only
`Window.backward` changes a gradient of the optimizers' parameters, and nothing their values.

Tensors count their in-place changes (`Tensor._version`), and a backward pass adds to the gradient
that is there, once. So a gradient that every backward pass of a window reached has to be the same
tensor at its end, changed once by each pass after the first. Where the first windows show that this
does not hold (a parameter that not every micro-batch reaches, sparse gradients, hooks), gradients
are looked at before and after every backward pass, which costs more.

Reading what a parameter counts takes a tenth of a microsecond, and several where it has left the
processor's cache. Of models with many parameters whose first window showed nothing, gradients are
therefore looked at when the window begins, around its first backward pass, and at its end.

Autograd makes a node for each parameter that adds to its gradient, and drops it with the graph that
it is in. A loop written by hand keeps the last graph through the next forward pass, in its variable
`loss`, and with it the nodes; a window keeps the nodes alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from itertools import repeat
from operator import attrgetter, is_, is_not
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.nn import Parameter

from autobatch.accumulate.hooks import note_on_hooks
from autobatch.errors import AutobatchWarning, WorkloadError

__all__ = ["Watch", "versions"]

_version, _gradient = attrgetter("_version"), attrgetter("grad")
_hooks, _layout = attrgetter("_post_accumulate_grad_hooks"), attrgetter("layout")

_MANY, _NORMED, _LOOKS = 64, 2, 2


def versions(tensors: Iterable[Tensor]) -> list[int]:
    """Return how often each tensor was changed in place; 0 of those made in inference mode.

    They count nothing, and outside of that mode PyTorch refuses to write to them.
    """
    listed = list(tensors)
    try:
        return list(map(_version, listed))
    except RuntimeError:
        return [0 if tensor.is_inference() else tensor._version for tensor in listed]


class Watch:
    """Looks at parameters and gradients of one window after the other.

    Args:
        shows_gradients: whether gradients are in `.grad` after every backward pass.
        moves: whether backward passes may put other tensors there.
    """

    def __init__(self, *, shows_gradients: bool = True, moves: bool = False) -> None:
        self._shows = shows_gradients
        self._may_move = moves
        self._moves = moves  # whether all is looked at, before and after every backward pass
        self._is_new = True  # nothing is known of these parameters yet
        self._has_noted = False  # what hooks they have
        self._is_thorough = False  # whether each backward pass is looked at
        self._writes: set[int] = set()  # parameters that a forward pass writes to
        self._parameters: list[Tensor] = []
        self._nodes: list[Any] = []  # that add to their gradients
        self._before_forward: list[int] | None = None
        self._norms: list[Tensor] = []
        self._value_norms: list[Tensor] = []
        self._values: list[int] | None = None
        self._gradients: list[Tensor | None] = []
        self._held: list[Tensor] = []
        self._versions: list[int] = []
        self._passes = 0  # since the gradients were remembered
        self._total = 0  # of the window
        self._adds = True  # whether every pass added to every gradient, in place

    def begin(self, parameters: list[Tensor]) -> bool:
        """Begin a window; return whether gradients of something else are there.

        Args:
            parameters: those that the update changes.
        """
        if parameters is not self._parameters:
            self._parameters, self._is_new = parameters, True
            self._nodes = []
        if self._is_new:
            self._is_thorough = len(parameters) < _MANY
            self._moves = self._may_move or any(map(_hooks, parameters))
            self._writes = set()
        self._before_forward = versions(parameters) if self._is_new or self._is_thorough else None
        self._values = None
        self._gradients, self._held, self._versions, self._norms = [], [], [], []
        self._passes, self._total, self._adds = 0, 0, True
        return self._has_gradients()

    def _has_gradients(self) -> bool:
        return any(map(is_not, map(_gradient, self._parameters), repeat(None)))

    def note_hooks(self) -> None:
        """Warn, once, of hooks of the user's that saw parts of a window's gradient."""
        if self._has_noted:
            return
        self._has_noted = True
        note = note_on_hooks(self._parameters)
        if note is not None:
            warnings.warn(note, AutobatchWarning, stacklevel=4)

    def before_backward(self) -> None:
        """Check that nothing changed since the last backward pass.

        Raises:
            WorkloadError: gradients were added or dropped by something else.
        """
        if self._values is None:
            self._values = versions(self._parameters)
            if self._before_forward is not None:
                # Embedding's max_norm, for instance, is applied to the weight itself
                pairs = zip(self._before_forward, self._values, strict=True)
                self._writes |= {at for at, (a, b) in enumerate(pairs) if a != b}
            if self._is_new:
                self._nodes = list(map(get_gradient_edge, filter(_is_plain, self._parameters)))
            self._value_norms = _norms(self._parameters) if self._is_new else []
            if self._has_gradients():
                raise _changed("were there before its first window.backward")
        elif self._moves:
            self._check()
        elif self._is_thorough and versions(self._held) != self._versions:
            raise _changed("were changed between two calls of window.backward")
        if self._norms:
            self._check_norms()

    def after_backward(self, *, averaged: bool) -> None:
        """Remember the gradients as this backward pass left them.

        Args:
            averaged: whether it replaced them by averages over the ranks.
        """
        self._passes += 1
        if averaged or self._moves or not self._gradients:
            self._remember()
        elif self._is_thorough:
            expected = [version + 1 for version in self._versions]
            if len(self._held) < len(self._parameters):
                self._remember_new()
            self._versions, self._passes = versions(self._held), 0
            self._adds &= self._versions == expected
        if self._is_new:
            is_looked_at = not self._moves and self._total < _LOOKS
            self._norms = _norms(self._held) if is_looked_at else []
            self._total += 1

    def before_move(self) -> None:
        """Check gradients before they are averaged or moved, after which they are others.

        Raises:
            WorkloadError: gradients were added or dropped by something else.
        """
        if self._gradients:
            self._check()

    def after_move(self) -> None:
        """Remember the gradients where they are now."""
        if self._gradients:
            self._remember()
            self._norms = []

    def _remember(self) -> None:
        self._gradients = list(map(_gradient, self._parameters))
        self._held = [gradient for gradient in self._gradients if gradient is not None]
        self._versions = versions(self._held)
        self._passes = 0
        if self._is_new and any(map(is_not, map(_layout, self._held), repeat(torch.strided))):
            self._moves = True

    def _remember_new(self) -> None:
        """Remember gradients of parameters that this backward pass was the first to reach."""
        for at, gradient in enumerate(map(_gradient, self._parameters)):
            if gradient is not None and self._gradients[at] is None:
                self._gradients[at] = gradient
                self._held.append(gradient)

    def _check(self) -> None:
        """Check that gradients are the same tensors, changed by as many backward passes."""
        now_there = list(map(_gradient, self._parameters))
        if not all(map(is_, self._gradients, now_there)):
            self._adds = False
            pairs = zip(self._gradients, now_there, strict=True)
            if any(before is not None and before is not now for before, now in pairs):
                raise _changed("were dropped or replaced between two calls of window.backward")
            self._remember_new()
        now, passes = versions(self._held), self._passes
        expected = [version + passes for version in self._versions] if passes else self._versions
        if now != expected:
            self._adds = False
            # those that were reached late are at the end of the list
            if any(found > most for found, most in zip(now, expected)):  # noqa: B905
                raise _changed("were changed between two calls of window.backward")
        self._check_norms()

    def _check_norms(self) -> None:
        """Check values themselves in the first window, as writes through `.data` are not counted.

        A few tensors tell: what is left in a loop is done to all of them.
        """
        if self._norms:
            now = _norms(self._held)
            if not all(map(_is_same, self._norms, now)):
                raise _changed("were changed through .data between two calls of window.backward")

    def end(self, parameters: list[Tensor]) -> None:
        """Check once more when the last micro-batch has ended, and learn how to look.

        Args:
            parameters: those that the update changes, by now.

        Raises:
            WorkloadError: gradients or parameters were changed by something else.
        """
        if self._values is None:
            return
        if parameters is not self._parameters:
            raise WorkloadError(
                "the optimizers were given other parameters while the window ran, so that not all "
                "of its micro-batches reached them: change their groups between windows"
            )
        now = versions(self._parameters)
        self._check()
        if now != self._values:
            self._check_values(now)
        elif not all(map(_is_same, self._value_norms, self._norms_now())):
            raise _written(1, len(now))
        if self._shows and self._parameters and not self._held:
            self._note_no_gradients()
        self._is_thorough = self._moves or not self._adds or self._is_one_missing()
        self._is_new = False
        # what happens to gradients now is the user's
        self._gradients, self._held, self._norms = [], [], []

    def _norms_now(self) -> list[Tensor]:
        return _norms(self._parameters) if self._value_norms else []

    def _is_one_missing(self) -> bool:
        """Whether a parameter has no gradient that a later micro-batch may give it."""
        if len(self._held) == len(self._parameters):
            return False
        return len(self._held) < sum(parameter.requires_grad for parameter in self._parameters)

    def _check_values(self, now: list[int]) -> None:
        assert self._values is not None
        pairs = zip(self._values, now, strict=True)
        changed = sum(
            a != b and at not in self._writes and self._parameters[at].requires_grad
            for at, (a, b) in enumerate(pairs)
        )
        if changed:
            raise _written(changed, len(now))

    def _note_no_gradients(self) -> None:
        if any(map(_hooks, self._parameters)):
            raise WorkloadError(
                "hooks of the backward pass take the gradients away, so that a window cannot add "
                "them up: step and drop them once, with window.step()"
            )
        warnings.warn(
            "no parameter of the optimizers has a gradient after the window, so its update changes "
            "nothing: check that the loss comes from the module whose parameters they hold",
            AutobatchWarning,
            stacklevel=5,
        )


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, Parameter) and tensor.requires_grad and tensor.is_leaf


def _norms(tensors: list[Tensor]) -> list[Tensor]:
    """Return the norms of the first and last tensors, if all are plain ones."""
    some = [*tensors[:_NORMED], *tensors[_NORMED:][-_NORMED:]]
    if not all(type(t) in (Tensor, Parameter) and t.is_floating_point() for t in some):
        return []
    with torch.no_grad():
        return [tensor.norm() for tensor in some]


def _is_same(before: Tensor, now: Tensor) -> bool:
    return bool(((before == now) | (before.isnan() & now.isnan())).item())


def _written(changed: int, parameters: int) -> WorkloadError:
    return WorkloadError(
        f"{changed} of {parameters} parameters were changed while the window ran, so its gradient "
        "is of no single model: leave optimizer.step() to window.step(), and let no hook of a "
        "backward pass step an optimizer"
    )


def _changed(what: str) -> WorkloadError:
    return WorkloadError(
        f"gradients of the window {what}: leave zero_grad(), loss.backward() and step() to the "
        "window, clip after `for batch in window`, and run other models' windows before or after"
    )
