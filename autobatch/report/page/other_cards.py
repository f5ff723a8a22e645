"""The command that asks about cards which a plan's page cannot answer for.

Invariant: it asks about the training that the plan is of. Where that cannot be said in a command,
there is none, and the page says why.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import NamedTuple

from autobatch.gpus.catalogue import find_gpu
from autobatch.records.plan_record import PlanRecord

__all__ = ["DROPPED", "KEPT", "OtherCards", "other_cards"]

KEPT = {
    "--target": True,
    "--headroom": True,
    "--objective": True,
    "--input-shape": True,
    "--sample": True,
    "--world-size": True,
    "--sharding": True,
    "--optimizer": True,
    "--clip-norm": True,
    "--autocast": True,
    "--precision": True,
    "--activation-checkpointing": None,
    "--lora": True,
    "--no-isolate": False,
}
"""Options of `probe` that `compare` has, too: whether a value follows; None where one may."""

DROPPED = {
    "--gpu": True,
    "--report": True,
    "--open": False,
    "--json": True,
    "--prove": False,
    "--no-cache": False,
    "--time-limit": True,
    "--vary": True,
    "--levers": True,
    "--allow-numerics": False,
    "--trials": True,
    "--timeout": True,
    "--storage": True,
    "--study": True,
    "--sampler": True,
    "--quiet": False,
    "--verbose": False,
    "--debug": False,
    "-q": False,
    "-v": False,
}
"""Options that say where a plan is made or kept, or how it is looked for: not what is trained."""

_FROM_A_FILE = "--config"

_OFFERED = ("t4", "l4", "rtx-4090", "a100-40gb", "a100-80gb", "h100-80gb")

_TENSOR_CORES = (8, 0)
"""The compute capability from which on cards multiply in bfloat16 and TF32."""

_OTHERS = "Cards with other kernels need a simulation of their own, and so do other settings"


class OtherCards(NamedTuple):
    """What the page says of other cards: a sentence, and the line to copy; "" for none."""

    text: str
    line: str


def other_cards(plan: PlanRecord) -> OtherCards:
    """Return how to ask about other cards."""
    known = {card.name for card in plan.what_if.cards} if plan.what_if else {plan.gpu.name}
    cards = [name for name in _OFFERED if name not in known and _has_formats(name, plan)]
    words = _words(plan.command)
    if plan.command and "sweep" in words[1:2] and plan.levers:
        levers = "; ".join(lever.label for lever in plan.levers)
        return _without(f"on a SPEC whose function applies what was found here ({levers})")
    if not plan.command:
        if plan.levers:
            levers = "; ".join(lever.label for lever in plan.levers)
            return _without(f"of a Workload that has the levers of this plan ({levers})")
        return OtherCards(
            f"{_OTHERS} of the training. In Python, with `options` as tune was given them (sample, "
            "loss, optimizer and what else there was):",
            _call(plan, cards),
        )
    options = _training(words)
    if options is None:
        why = "takes options from a file" if _FROM_A_FILE in plan.command else "is not known here"
        return _without(f"with the options of the command that made this page, which {why}")
    command = shlex.join(["autobatch", "compare", *options, "--gpus", ",".join(cards)])
    return OtherCards(f"{_OTHERS} of the training:", command)


def _has_formats(card: str, plan: PlanRecord) -> bool:
    """Whether a card multiplies in the formats of a plan, without which `compare` refuses it."""
    needs = {"precision: tf32", "precision: bf16 weights"} & {lever.label for lever in plan.levers}
    return not needs or find_gpu(card).compute_capability >= _TENSOR_CORES


def _without(what: str) -> OtherCards:
    return OtherCards(f"{_OTHERS} of the training: run `autobatch compare` {what}.", "")


def _call(plan: PlanRecord, cards: Sequence[str]) -> str:
    """Return the call of `autobatch.compare`, with what the plan knows of the training."""
    settings = {
        "target": plan.target,
        "gpus": list(cards),
        "headroom": plan.headroom,
        "objective": None if plan.objective == "largest" else plan.objective,
        "world_size": None if plan.world_size == 1 else plan.world_size,
        "sharding": None if plan.sharding == "custom" else plan.sharding,
        "autocast": plan.model.autocast,
        "clip_norm": plan.model.clip_norm,
    }
    given = [f"{name}={value!r}" for name, value in settings.items() if value is not None]
    return f"autobatch.compare({', '.join(('model', *given, '**options'))})"


def _words(command: str | None) -> list[str]:
    """Return the words of a command from its verb on, after the program's name."""
    try:
        words = shlex.split(command or "")
    except ValueError:  # an open quote: nobody typed that
        return []
    while len(words) > 1 and words[1].startswith("-"):  # what is shown may be said before the verb
        del words[1]
    return words


def _training(words: Sequence[str]) -> list[str] | None:
    """Return the words of a command that say what is trained; None where not all are understood."""
    if list(words[:1]) != ["autobatch"] or words[1:2] not in (["probe"], ["sweep"]):
        return None
    kept: list[str] = []
    specs = 0
    rest = list(words[2:])
    while rest:
        word = rest.pop(0)
        if not word.startswith("-"):
            kept.append(word)
            specs += 1
            continue
        typed, equals, _ = word.partition("=")
        name = _option(typed)
        if name is None:
            return None
        takes_value = KEPT.get(name, DROPPED.get(name))
        follows = (
            not equals
            and bool(rest)
            and (takes_value is True or (takes_value is None and not rest[0].startswith("-")))
        )
        option = [word, *([rest.pop(0)] if follows else [])]
        if name in KEPT:
            kept += option
    return kept if specs == 1 else None


def _option(typed: str) -> str | None:
    """Return the option that was meant: argparse takes beginnings that are of one alone."""
    known = (*KEPT, *DROPPED)
    if typed in known:
        return typed
    begun = [name for name in (*known, _FROM_A_FILE) if name.startswith(typed)]
    return begun[0] if len(begun) == 1 and typed.startswith("--") and begun[0] in known else None
