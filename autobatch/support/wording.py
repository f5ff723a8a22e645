"""Pieces of messages: counts, errors in one line, names alike, options as the reader knows them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from contextvars import ContextVar

__all__ = [
    "ON_COMMAND_LINE",
    "argument",
    "count",
    "for_reader",
    "given",
    "listed",
    "near",
    "one_line",
    "passing",
    "said_by",
]

ON_COMMAND_LINE: ContextVar[bool] = ContextVar("on_command_line", default=False)
"""Whether the reader of messages typed a command, and knows options rather than arguments."""


def for_reader(python: str, command_line: str) -> str:
    """Return the wording for who reads it: of a call in Python, or of a command.

    >>> for_reader("gpu='t4'", "--gpu t4")
    "gpu='t4'"
    """
    return command_line if ON_COMMAND_LINE.get() else python


def argument(name: str) -> str:
    """Name an argument as its reader gives it: as an option, where there is a command.

    >>> argument("clip_norm")
    'clip_norm'
    """
    return for_reader(name, f"--{name.replace('_', '-')}")


def given(name: str, value: object) -> str:
    """Write an argument with its value as its reader gives it: as an option, in a command.

    >>> given("world_size", 8), given("sharding", "fsdp")
    ('world_size=8', 'sharding="fsdp"')
    """
    written = f'"{value}"' if isinstance(value, str) else value
    return for_reader(f"{name}={written}", f"{argument(name)} {value}")


def passing(name: str, value: str = "…") -> str:
    """Say how to give what no command has an option for: in the Workload that a function returns.

    >>> passing("loss", "nn.MSELoss()")
    'pass loss=nn.MSELoss()'
    """
    return for_reader(
        f"pass {name}={value}",
        f"let the function that SPEC names return an autobatch.Workload with {name}={value}",
    )


def count(number: int, noun: str, plural: str | None = None) -> str:
    """Render a number with its noun; the plural, where it is not given, ends in s.

    >>> count(1, "GPU"), count(1024, "sample"), count(2, "retry", "retries")
    ('1 GPU', '1,024 samples', '2 retries')
    """
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def one_line(error: BaseException) -> str:
    r"""Return an error's class and message in one line of bounded length.

    >>> one_line(ValueError("two\nlines")), one_line(KeyboardInterrupt())
    ('ValueError: two lines', 'KeyboardInterrupt')
    """
    name, message = type(error).__name__, " ".join(str(error).split())
    return f"{name}: {message}"[:300] if message else name


def said_by(error: BaseException) -> str:
    r"""Return what user code raised in one line: an exit too, and all that a message has to say.

    >>> said_by(ValueError("a\nb")), said_by(SystemExit(3))
    ('ValueError: a b', 'it ended the process by sys.exit(3), which no part of a workload may do')
    """
    if isinstance(error, SystemExit):
        return (
            f"it ended the process by sys.exit({error.code!r}), which no part of a workload may do"
        )
    return one_line(error)


def near(word: str, known: Iterable[str]) -> str:
    """Return " (did you mean ...?)" with the closest names, or nothing."""
    names = difflib.get_close_matches(word, list(known), n=3)
    return f" (did you mean {' or '.join(names)}?)" if names else ""


def listed(words: Sequence[str], most: int) -> str:
    """Join words with commas; of more than `most`, say how many are left out.

    >>> listed(["one", "two", "three"], 2)
    'one, two and 1 more'
    """
    more = f" and {len(words) - most} more" if len(words) > most else ""
    return ", ".join(words[:most]) + more
