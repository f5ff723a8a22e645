"""The command `doctor`: what this machine has, and what is missing."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from autobatch.cli.options import JSON_HELP, add_verb
from autobatch.cli.running import outputs, tell

if TYPE_CHECKING:
    from autobatch.cli.checkup import Checkup
    from autobatch.report.document import Document

__all__ = ["add"]

_MARKS = {"ok": "", "note": "! ", "problem": "✗ "}


def add(verbs: Any) -> None:
    """Add the command to a parser's sub-parsers."""
    parser = add_verb(
        verbs,
        "doctor",
        _run,
        usage="[options]",
        help="say what works on this machine, what is simulated, and what is missing",
        description="Look at versions, GPUs, the allocator's settings, optional libraries and the "
        "cache, and run a small simulation; 1 where something that is needed is wrong.",
        examples=["doctor", "doctor --json -    # for a bug report"],
    )
    parser.add_argument("--json", metavar="FILE", help=JSON_HELP)


def _run(arguments: argparse.Namespace) -> int:
    from autobatch.cli.checkup import checkup

    with outputs(arguments):
        found = checkup()
        tell(arguments, found, _document(found))
    return 1 if found.problems else 0


def _document(found: Checkup) -> Document:
    """Return what was found, the problems first."""
    from autobatch.report.document import Bullets, Code, Document, Facts, Section, printable
    from autobatch.support.wording import count

    problems = found.problems
    title = "All that autobatch needs is here"
    if problems:
        title = f"{count(len(problems), 'problem')}: {', '.join(each.name for each in problems)}"
    noted = [
        each
        for verdict in ("problem", "note")
        for each in found.findings
        if each.verdict == verdict and each.advice
    ]
    said = tuple(f"{each.name}: {printable(each.advice)}" for each in noted if not each.installs)
    lines = "\n".join(dict.fromkeys(each.advice for each in noted if each.installs))
    sections = [
        Section(
            name,
            (
                Facts(
                    tuple(
                        (each.name, f"{_MARKS[each.verdict]}{printable(each.value)}")
                        for each in found.findings
                        if each.section == name
                    )
                ),
            ),
        )
        for name in dict.fromkeys(each.section for each in found.findings)
    ]
    if said:
        sections.append(Section("What to do", (Bullets(said),)))
    if lines:
        sections.append(Section("To install what is missing", (Code(lines),)))
    notes = sum(each.verdict == "note" for each in found.findings)
    subtitle = f"{count(notes, 'thing')} to know, marked !" if notes else "nothing is missing"
    return Document(title=title, subtitle=subtitle, sections=tuple(sections))
