"""The code of a plan's levers, in the parts that a training script has.

Options show lines that change `model`, `optimizer` or `batch`, or a header that goes around the
loop. A script has a place for each.

Invariant: no line of a lever is left out: what is no Python by itself stands there as comments.
"""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from autobatch.records.applied import AppliedLever

__all__ = ["LeverCode", "in_force", "lever_code", "steps_in_backward"]

_REMADE = """\
# an optimizer of the same kind, over the parameters that are trained now
trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
optimizer = type(optimizer)([{**optimizer.param_groups[0], "params": trained}])"""


@dataclass(frozen=True, slots=True, kw_only=True)
class LeverCode:
    """Lines of Python, each part with the names of its levers as comments; "" where it is empty.

    Attributes:
        first: what has to run before torch is imported.
        model: what changes `model`, before it is wrapped and before optimizers are made.
        optimizer: what makes another `optimizer` of it.
        remade: what makes an optimizer of the same kind again, where other parameters are trained
            and no lever makes one.
        batch: what changes each `batch`.
        around: headers of `with` statements in which the loop runs.
        shares: whether `model` is shared out over GPUs by these lines.
    """

    first: str
    model: str
    optimizer: str
    remade: str
    batch: str
    around: tuple[str, ...]
    shares: bool


def lever_code(levers: Iterable[AppliedLever], *, imported: Sequence[str] = ()) -> LeverCode:
    """Return the code of levers in the parts of a script.

    Autocast is left out: it is a setting of the plan, which loops and trainers have by themselves.

    Args:
        levers: in the order in which they were applied.
        imported: lines of imports that the script has already.
    """
    levers = tuple(lever for lever in levers if not _is_autocast(lever))
    parts: dict[str, list[str]] = {"first": [], "model": [], "optimizer": [], "batch": []}
    around: list[str] = []
    known = set(imported)
    for lever in levers:
        lines, header = _without_header(lever.code)
        if header is not None:
            around.append(header)
        for part, text in _parted(lever, lines, known):
            parts[part].append(f"# {_on_one_line(lever.label)}\n{text}")
    texts = {part: "\n".join(found) for part, found in parts.items()}
    is_adapted = any(lever.lever == "lora" for lever in levers) and not texts["optimizer"]
    return LeverCode(
        **texts,
        remade=_REMADE if is_adapted else "",
        around=tuple(around),
        shares=any(lever.lever == "sharding" for lever in levers),
    )


def in_force(code: str, around: Sequence[str]) -> str:
    r"""Put the last statement of a script, its loop, into `with` statements.

    >>> print(in_force("import torch\ntrain()", ["with deterministic():"]))
    import torch
    with deterministic():
        train()
    """
    for header in around:
        lines = code.split("\n")
        start = ast.parse(code).body[-1].lineno - 1
        loop = textwrap.indent("\n".join(lines[start:]), "    ")
        code = "\n".join((*lines[:start], header, loop))
    return code


def steps_in_backward(levers: Iterable[AppliedLever]) -> bool:
    """Whether hooks step optimizers in the backward pass, so that the loop must not."""
    return any(lever.label == "optimizer: in backward" for lever in levers)


def _is_autocast(lever: AppliedLever) -> bool:
    return lever.lever == "precision" and lever.value in ("bf16 autocast", "fp16 autocast", "fp32")


def _without_header(code: str) -> tuple[str, str | None]:
    """Return code without a header of `with` that has no body, and this header."""
    *lines, last = code.rstrip().split("\n")
    header = last.partition("#")[0].rstrip()
    if last.startswith("with ") and header.endswith(":") and _parsed(f"{header}\n    pass"):
        return "\n".join(lines), header
    return code, None


def _parsed(code: str) -> list[ast.stmt]:
    """Return the statements of code; none where it is no Python."""
    try:
        return ast.parse(code).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []


def _parted(lever: AppliedLever, code: str, known: set[str]) -> list[tuple[str, str]]:
    """Return the lines of a lever by the part of a script that they belong to."""
    statements = _parsed(code)
    lines = code.rstrip().split("\n")
    if not statements:
        said = textwrap.indent(code.rstrip(), "# ", lambda line: not line.startswith("#"))
        return [("model", said)] if said else []
    if lever.lever == "allocator":
        return [("first", code.rstrip())]
    of_model = [place for place, each in enumerate(statements) if _binds(each, "model")]
    ends = [*(each.lineno - 1 for each in statements[1:]), len(lines)]
    makes_optimizer = any(_binds(each, "optimizer", "optimizers") for each in statements)
    last_of_model = max(of_model, default=-1) if makes_optimizer else len(statements)
    imports: list[str] = []
    found: dict[str, list[str]] = {}
    begin = 0
    for place, (statement, end) in enumerate(zip(statements, ends, strict=True)):
        text = "\n".join(lines[begin:end])
        begin = end
        if isinstance(statement, (ast.Import, ast.ImportFrom)):
            if text not in known:
                known.add(text)
                imports.append(text)
            continue
        if _binds(statement, "batch"):
            part = "batch"
        else:
            part = "model" if place <= last_of_model else "optimizer"
        found.setdefault(part, []).append(text)
    at_head = next((part for part in found if part != "batch"), "model")
    if imports:
        found[at_head] = [*imports, *found.get(at_head, [])]
    return [(part, "\n".join(texts)) for part, texts in found.items()]


def _binds(statement: ast.stmt, *names: str) -> bool:
    """Whether a statement gives a value to one of some names."""
    return isinstance(statement, ast.Assign) and any(
        isinstance(target, ast.Name) and target.id in names for target in statement.targets
    )


def _on_one_line(text: str) -> str:
    return " ".join(text.split())
