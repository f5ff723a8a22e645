"""What code asks of the simulated card while it runs, so that its run may stand for other cards.

Code that reads the name or the memory of the card may do something else on another one; code that
reads the compute capability, on a card of another generation.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from types import SimpleNamespace
from typing import Any, Literal

__all__ = ["Properties", "Question", "note_question", "questions"]

Question = Literal["card", "capability"]
"""What was asked: something that each card has its own of, or its compute capability."""

_ASKED: ContextVar[set[Question] | None] = ContextVar("asked", default=None)

_QUESTIONS: dict[str, Question] = {
    "name": "card",
    "total_memory": "card",
    "major": "capability",
    "minor": "capability",
}


@contextlib.contextmanager
def questions() -> Iterator[set[Question]]:
    """Yield a set that gets what the code of the block asks, also within another such block.

    >>> with questions() as asked:
    ...     note_question("card", 1)
    1
    >>> asked
    {'card'}
    """
    asked: set[Question] = set()
    token = _ASKED.set(asked)
    try:
        yield asked
    finally:
        _ASKED.reset(token)
        if (outer := _ASKED.get()) is not None:
            outer |= asked


def note_question(question: Question, answer: Any) -> Any:
    """Return an answer, and note that it was asked for."""
    asked = _ASKED.get()
    if asked is not None:
        asked.add(question)
    return answer


class Properties(SimpleNamespace):
    """What CUDA tells of a card in one object; it notes which of it is read."""

    def __getattribute__(self, name: str) -> Any:
        """Return a property of the card."""
        value = super().__getattribute__(name)
        return note_question(_QUESTIONS[name], value) if name in _QUESTIONS else value
