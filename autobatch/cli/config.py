"""Options of a command from a TOML file.

Invariant: a file says nothing that the command line could not; keys are names of options, and what
is typed wins.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from autobatch.errors import FileError, UsageError
from autobatch.support.files import read_text
from autobatch.support.wording import near

__all__ = ["with_config"]

_LIMIT_BYTES = 2**20

_UNSET = object()


def with_config(
    path: str, words: Sequence[str], verb: str, parsers: Mapping[str, argparse.ArgumentParser]
) -> list[str]:
    """Return a command line with the options of a file added that it does not have.

    Args:
        path: the file. Its options are at the top, in a table with the name of the command, which
            other commands pass over, or below `tool.autobatch`, as in a pyproject.toml.
        words: the command line, with the name of the command.
        verb: that name.
        parsers: of all commands, by name.

    Raises:
        FileError: the file cannot be read, or is no TOML.
        UsageError: it has a key that is no option of the command, or a value that none could have.
    """
    parser = parsers[verb]
    options = {_name_of(action): action for action in _options(parser)}
    typed = _typed(parser, words[words.index(verb) + 1 :])
    added: list[str] = []
    last: list[str] = []
    for key, value in _read(path, verb, parsers).items():
        name = key.replace("_", "-")
        action = options.get(name)
        if action is None:
            raise UsageError(
                f"{path!r} sets {key!r}, which is no option of `autobatch {verb}`"
                f"{near(name, options)}"
            )
        if action.dest not in typed:
            words_of = _words(f"{path!r} sets {key} = {_written(value)}", parser, action, value)
            (added if action.option_strings else last).extend(words_of)
    at = words.index(verb) + 1
    return [*words[:at], *added, *words[at:], *last]


def _read(path: str, verb: str, verbs: Iterable[str]) -> dict[str, Any]:
    """Return the keys of a file that are for a command, with their values."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

    try:
        found: dict[str, Any] = tomllib.loads(read_text(path, limit_bytes=_LIMIT_BYTES))
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise FileError(f"{path!r} is no TOML file: {error}") from error
    if "tool" in found:
        found = _table(path, "tool.autobatch", _table(path, "tool", found))
    tables = {key: value for key, value in found.items() if isinstance(value, dict)}
    for key in tables:
        if key not in verbs:
            raise UsageError(f"{path!r} has a table [{key}], which is no command{near(key, verbs)}")
    return {k: v for k, v in found.items() if k not in tables} | tables.get(verb, {})


def _table(path: str, name: str, above: Mapping[str, Any]) -> dict[str, Any]:
    """Return a table of the one above it, empty where there is none.

    Raises:
        UsageError: it is something else.
    """
    found: object = above.get(name.rpartition(".")[2], {})
    if isinstance(found, dict):
        return found
    raise UsageError(
        f"{path!r} sets {name} = {_written(found)}, which is no table: write options below "
        "[tool.autobatch], or at the top of a file that has no `tool`"
    )


def _options(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    return [action for action in parser._actions if action.dest not in ("help", "config")]


def _name_of(action: argparse.Action) -> str:
    """Return the name of an option without its dashes; of an argument, the name that it has."""
    return max(action.option_strings, key=len, default=action.dest).lstrip("-")


def _typed(parser: argparse.ArgumentParser, words: Sequence[str]) -> set[str]:
    """Return which options a command line has, whether or not what it needs is there."""
    import copy

    parser = copy.deepcopy(parser)
    for action in parser._actions:
        if action.dest != "help":
            action.default, action.required = _UNSET, False
            if not action.option_strings:
                action.nargs = "?"
            if isinstance(action, argparse._AppendAction):
                action.default = None
    found, _ = parser.parse_known_args(list(words))
    return {name for name, value in vars(found).items() if value not in (_UNSET, None)}


def _words(
    told: str, parser: argparse.ArgumentParser, action: argparse.Action, value: object
) -> list[str]:
    """Return a value of a file as it would be typed, with its option.

    Args:
        told: how a message about it begins.
        parser: of the command.
        action: the option.
        value: of a key of the file.

    Raises:
        UsageError: the option cannot have such a value.
    """
    name = max(action.option_strings, key=len, default="")
    if action.nargs == 0:  # a switch
        if not isinstance(value, bool):
            raise UsageError(f"{told}: use true or false")
        return [name] if value else []
    if isinstance(value, bool) and action.nargs == "?":
        return [name] if value else []
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(one, (str, int, float)) and not isinstance(one, bool) for one in values):
        raise UsageError(f"{told}: use a number, a text, or a list of them")
    texts = [str(one) for one in values]
    if not isinstance(action, argparse._AppendAction):
        texts = [",".join(texts)]
    for text in texts:
        _require_possible(told, parser, action, text)
    return [f"{name}={text}" if name else text for text in texts]


def _require_possible(
    told: str, parser: argparse.ArgumentParser, action: argparse.Action, text: str
) -> None:
    """See that an option can have a value: argparse would not say which file it is from."""
    choices = [str(each) for each in action.choices or ()]
    if choices and text not in choices:
        raise UsageError(f"{told}{near(text, choices)}: use {', '.join(choices)}")
    try:
        parser._get_value(action, text)
    except argparse.ArgumentError as error:
        raise UsageError(f"{told}: {error.message}") from error


def _written(value: object) -> str:
    """Write a value as TOML has it.

    >>> _written(True), _written(["t4", 3])
    ('true', '["t4", 3]')
    """
    return json.dumps(value, default=str, ensure_ascii=False)
