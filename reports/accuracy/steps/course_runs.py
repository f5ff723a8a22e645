"""The runs of public course code: what their scripts do, as far as it decides memory.

Each script was read in the repository that the row names. Scripts of other repositories are taken
to be like the course's own hand-out, and that is listed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from autobatch.gpus.catalogue import CATALOGUE
from reports.accuracy.steps.configuration import IncompleteError, Reading, Step, StepRow, card_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Script:
    """What a repository's script does.

    Attributes:
        loss: "course" (op by op) or "torch".
        optimizer: where the row's column says less than the code: "course" or "torch".
        keeps_graph: whether a forward pass alone builds the graph.
        empties_cache: before the window that is measured.
        first_window: the measured window is the first of the process.
        zero_grad: when gradients are dropped: "start", "after forward" or "never".
        keeps_variables: logits and loss live until the next step assigns its own.
        length: tokens in a sample, where the row points to the script.
        allocator: `PYTORCH_CUDA_ALLOC_CONF` that it sets.
        model: "course", or "own" for the one in `course_own.py`.
        own_model: why the model is neither of them; empty where it is.
    """

    loss: str = "course"
    optimizer: str = "course"
    keeps_graph: bool = True
    empties_cache: bool = False
    first_window: bool = False
    zero_grad: str = "start"
    keeps_variables: bool = False
    length: int | None = None
    allocator: str = ""
    model: str = "course"
    own_model: str = ""


_OWN = "the repository's own model, of which its other modules are not published with it"
SCRIPTS = {
    "EnzoDing-rgb/cs336-assignment2-systems": Script(empties_cache=True),
    "damek/cs336-assignment2-systems": Script(
        zero_grad="never", keeps_variables=True, allocator="expandable_segments:True"
    ),
    "Wedsonlin/assignment2-systems": Script(keeps_graph=False),
    "LINYUNLinYun/CS336-assignment2-systems": Script(
        loss="torch", optimizer="torch", keeps_graph=False, length=512
    ),
    "yyin-dev/cs336-a2": Script(),
    "NiuHuangxiaozi/assignment2-systems": Script(model="own"),
    "kkaitlyn111/cs336-a2-systems": Script(first_window=True, own_model=_OWN),
    "luke396/assignment2-systems": Script(own_model=_OWN),
    "kbjiang/cs336-assignment2-systems-mine": Script(own_model=_OWN),
}
_SINGLE = ("Wedsonlin/assignment2-systems", "LINYUNLinYun/CS336-assignment2-systems")
"""Their scripts of several GPUs make PyTorch's AdamW with `foreach=False`."""

_SHAPES = {
    "layers": r"(\d+) layers",
    "width": r"\bd (\d+)",
    "inner": r"\bff (\d+)",
    "heads": r"(\d+) heads",
    "vocabulary": r"vocab (\d+)",
}
_UNSAID = Script()


def course_step(row: StepRow) -> Step:
    """Return the step of a row of course code.

    Raises:
        IncompleteError: shapes, the script or the figure's unit are not known.
    """
    script = SCRIPTS.get(row["source"])
    assumed: list[str] = []
    if script is None:
        assumed.append("the script is taken to be like the course's hand-out")
        script = _UNSAID
    _require_known(row, script)
    options: dict[str, Any] = _shapes(row)
    gpu, of_card = card_of(row, CATALOGUE)
    assumed += of_card if row.world_size == 1 else ()
    options["length"] = (
        script.length
        if script.length and row["seq_or_image"] == "see script"
        else _whole(row, "seq_or_image", "the sequence length")
    )
    context = re.search(r"ctx (\d+) max", row["config"])
    if context:
        options["context"] = int(context[1])
    options["segment"] = _segment(row)
    options["autocast"] = _autocast(row)
    options["model"] = script.model
    options["loss"] = script.loss
    options["zero_grad"] = script.zero_grad
    options["keeps_variables"] = script.keeps_variables
    options["sharded_optimizer"] = "sharding" in row["sharding"]
    window, reading = _what(row, script)
    options["window"] = window
    options["keeps_graph"] = script.keeps_graph or "with graph" in row["config"]
    options["optimizer"] = _optimizer(row, script)
    return Step(
        builder="course",
        options=options,
        gpu=gpu,
        micro_batch=_whole(row, "batch_per_gpu", "the batch"),
        world_size=row.world_size,
        reading=reading,
        assumptions=tuple(assumed),
    )


def _require_known(row: StepRow, script: Script) -> None:
    if script.own_model or row["model"].startswith("own "):
        raise IncompleteError(script.own_model or _OWN)
    notes = row["notes"]
    if "read from memory_viz" in notes or "read off memory_viz" in notes:
        raise IncompleteError("the figure was read off a chart, its unit and instant are not known")
    if "rounded" in notes:
        raise IncompleteError("the figure is rounded to a whole number")
    if "own code" in row["config"] and script.model != "own":
        raise IncompleteError("the repository's own model code")


def _shapes(row: StepRow) -> dict[str, int]:
    found = {}
    for name, pattern in _SHAPES.items():
        match = re.search(pattern, row["config"])
        if match is None:
            raise IncompleteError(f"the model's shapes: {name}")
        found[name] = int(match[1])
    return found


def _whole(row: StepRow, column: str, what: str) -> int:
    text = row[column]
    if not text.isdigit():
        raise IncompleteError(f"{what} is given as {text!r}")
    return int(text)


def _segment(row: StepRow) -> int | None:
    told = row["checkpointing"]
    if told in ("none", "off", ""):
        return None
    match = re.search(r"segments of (\d+)", told)
    if match is None:
        raise IncompleteError(f"how checkpointing {told!r} is applied")
    return int(match[1])


def _autocast(row: StepRow) -> str | None:
    told = row["precision"]
    if told == "fp32":
        return None
    if told in ("bf16 autocast", "fp16 autocast"):
        return told.split()[0]
    raise IncompleteError(f"which precision {told!r} is")


def _optimizer(row: StepRow, script: Script) -> str:
    # a script that makes PyTorch's own optimizer wins over the column's general words
    if row["source"] in _SINGLE and row.world_size > 1:
        return "torch single"
    is_torch = script.optimizer == "torch" or row["optimizer"] == "torch AdamW"
    return "torch" if is_torch else "course"


def _what(row: StepRow, script: Script) -> tuple[str, Reading]:
    """Return which window runs, and where its figure is read."""
    told = row["config"]
    empties, window = script.empties_cache, 0 if script.first_window else 1
    if "after_model_init" in told:
        return "train", Reading(window=-1, phases=("setup",))
    if "after_optimizer_step" in told and "phase" in told:
        return "train", Reading(window=0, phases=("step",))
    if "allocated after the step" in told:
        return "train", Reading(phases=("step",), at_end=True, allocator=script.allocator)
    if "after the step" in told:
        return "train", Reading(window=0, phases=("step",), from_start=True)
    if re.search(r"forward( with graph)?$", told):
        return "forward", Reading(window=window, empties_cache=empties)
    if re.search(r"(training|full) step$", told) or "full training step" in told:
        return "train", Reading(window=window, empties_cache=empties)
    raise IncompleteError(f"what ran: {told!r}")
