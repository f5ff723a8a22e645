"""The commands, and how a command line is read.

Invariant: what cannot be understood is answered by one line that names what was meant.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import Any, NoReturn, cast

from autobatch._version import __version__
from autobatch.cli import (
    advise,
    check,
    compare,
    doctor,
    explain,
    gpus,
    predict,
    probe,
    report,
    sweep,
    vary,
)
from autobatch.cli.completion import HOW
from autobatch.cli.config import with_config
from autobatch.cli.options import add_shown, filled
from autobatch.support.wording import near

__all__ = ["parsed", "parser"]

_COMMANDS: tuple[Any, ...] = (
    probe,
    predict,
    advise,
    compare,
    vary,
    sweep,
    check,
    explain,
    report,
    gpus,
    doctor,
)
"""In the order in which the help lists them."""

_SHOWN = {
    "quiet": "print the answer's first line alone, and no progress",
    "verbose": "keep every step of the progress, and say all that is known",
    "debug": "show the traceback of errors, and warnings of libraries",
}

_EPILOG = """\
examples:
  autobatch probe hf:gpt2 --target 256 --gpu a100-40gb
  autobatch probe train.py:build --target 512 --gpu 24GiB --report out --open
  autobatch compare timm:resnet50 --target 1024 --gpus t4,l4,a100-40gb
  autobatch doctor

{completion}

exit codes: 0 done, 1 the workload failed or the check found a difference, 2 usage,
  3 nothing fits"""


def parser() -> argparse.ArgumentParser:
    """Return the parser of all commands; `run` of what it parses is the command's function."""
    return _parsers()[0]


def parsed(words: Sequence[str]) -> argparse.Namespace:
    """Read a command line, and the file of options that it names.

    Raises:
        SystemExit: it cannot be understood, or asks for help; what is to be said was printed.
        UsageError: the file cannot be read, or sets what is no option.
    """
    top, verbs = _parsers()
    words = list(words)
    config, verb = _config_of(words, verbs)
    if config is not None and verb is not None:
        words = with_config(config, words, verb, verbs)
    arguments, unknown = top.parse_known_args(words)
    if unknown:
        verbs[arguments.verb].unknown(unknown[0])
    return cast("argparse.Namespace", arguments)


def _parsers() -> tuple[_Parser, dict[str, _Parser]]:
    """Return the parser of all commands, and that of each by name."""
    top = _Parser(
        prog="autobatch",
        description=filled(
            "Find the micro-batch that fits a GPU, and where every byte of it goes."
        ),
        epilog=_EPILOG.format(completion=HOW),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"autobatch {__version__}")
    for short, name in (("-q", "quiet"), ("-v", "verbose"), ("--debug", "debug")):
        flags = [short] if short == "--debug" else [short, f"--{name}"]
        top.add_argument(*flags, dest=name, action="store_true", help=_SHOWN[name])
    verbs: Any = top.add_subparsers(metavar="COMMAND", dest="verb", required=True)
    for command in _COMMANDS:
        command.add(verbs)
    for each in verbs.choices.values():
        add_shown(each)
    return top, dict(verbs.choices)


def _config_of(words: Sequence[str], verbs: dict[str, _Parser]) -> tuple[str | None, str | None]:
    """Return the file of options that a command line names, and its command."""
    only = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    only.add_argument("--config")
    if any(word in ("-h", "--help") for word in words):
        return None, None
    # a trailing --config is told by the command's own parser
    named = only.parse_known_args(words)[0].config if words[-1:] != ["--config"] else None
    return named, next((word for word in words if word in verbs), None)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, and names what was meant."""

    _words: Sequence[str] = ()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Keep what was typed, for the message of an error."""
        self._words = list(args or ())
        return super().parse_known_args(args, namespace)

    def unknown(self, word: str) -> NoReturn:
        """Say that there is no such option or argument."""
        name = word.partition("=")[0]
        if not name.startswith("-"):
            self.error(f"there is no argument {name}")
        self.error(f"there is no option {name}{near(name, self._option_string_actions)}")

    def error(self, message: str) -> NoReturn:
        """Print one line, and end with the exit code of usage errors."""
        found = re.search(r"invalid choice: '(.*?)' (\(choose from .*\))", message)
        hint = near(found[1], re.findall(r"[\w-]+", found[2])[2:]) if found else ""
        if found and hint:
            message = message.replace(f" {found[2]}", "")
        if "arguments are required" in message and (misspelt := self._misspelt()):
            self.unknown(misspelt)
        self.exit(2, f"{self.prog}: error: {message}{hint}; see {self.prog} --help\n")

    def _misspelt(self) -> str | None:
        """Return a word that looks like an option, and is the beginning of none."""
        known = tuple(self._option_string_actions)
        for word in self._words:
            name = word.partition("=")[0]
            if name.startswith("--") and not any(option.startswith(name) for option in known):
                return name
        return None
