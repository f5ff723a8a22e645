"""The runs of transformers' models: attention tables of its docs, fine-tuning benchmarks.

Modelling code differs by release in what it keeps for the backward pass, so a row asks for the
release that it was measured with.
"""

from __future__ import annotations

import re
from typing import Any

from autobatch.gpus.catalogue import CATALOGUE
from reports.accuracy.steps.configuration import IncompleteError, Reading, Step, StepRow, card_of
from reports.accuracy.steps.published import published

_OF_ONE_PROCESS = (
    "tokens per sample times the processes: "
    "the Trainer counts tokens of one process, samples of all"
)
_LORA = re.compile(r"LoRA r=(\d+) ([\w ]+)")


def docs_step(row: StepRow) -> Step:
    """Return the step of a row of transformers' documentation: forward, sum of logits, backward.

    Raises:
        IncompleteError: the model, its input or the release are not known.
    """
    name = _model(row)
    told = row["config"]
    head = re.match(r"(\w+),", told)
    attention = re.search(r"attn (\w+)", told)
    if head is None or attention is None or "logits.sum()" not in told:
        raise IncompleteError(f"what ran: {told!r}")
    gpu, assumed = card_of(row, CATALOGUE)
    options: dict[str, Any] = {
        "model": name,
        "head": head[1],
        "attention": attention[1],
        "dtype": "float16" if row["precision"].startswith("fp16") else _dtype(row),
        "input": _input(row),
        "drops_gradients": True,
    }
    return Step(
        builder="docs",
        options=options,
        gpu=gpu,
        micro_batch=int(row["batch_per_gpu"]),
        transformers=_release(row),
        assumptions=(*assumed, "inputs of words with a mask of ones", "gradients dropped after"),
    )


def tuning_step(row: StepRow) -> Step:
    """Return the step of a fine-tuning benchmark with transformers' Trainer.

    Raises:
        IncompleteError: the model or how it is tuned is not known.
    """
    name = _model(row)
    lora = _LORA.match(row["config"])
    if lora is None and not row["config"].startswith("full finetune"):
        raise IncompleteError(f"how the model is tuned: {row['config']!r}")
    if row["checkpointing"] != "full":
        raise IncompleteError(f"checkpointing {row['checkpointing']!r}")
    gpu, assumed = card_of(row, CATALOGUE)
    sharding = row["sharding"]
    if sharding not in ("none", "fsdp1 full shard"):
        raise IncompleteError(f"sharding {sharding!r}")
    assumed += ("reentrant checkpointing, the Trainer's default", "gradients clipped at norm 1")
    if sharding != "none":
        assumed += ("FSDP2 stands for FSDP1", _OF_ONE_PROCESS)
    if _LATER[0] in row["torch"] and f"transformers {_LATER[1]}" not in row["torch"]:
        assumed += (f"transformers {_LATER[1]}, as the requirements with {_LATER[0]} say",)
    options: dict[str, Any] = {
        "model": name,
        "dtype": _dtype(row),
        "length": int(row["seq_or_image"]) * row.world_size,
        "lora": None
        if lora is None
        else {"r": int(lora[1]), "dropout": 0.1, "targets": lora[2].split()},
        "sharding": None if sharding == "none" else "fsdp",
    }
    if lora is not None:
        assumed += ("LoRA's dropout is 0.1, as the benchmark's scenarios say",)
    return Step(
        builder="tuning",
        options=options,
        gpu=gpu,
        micro_batch=int(row["batch_per_gpu"]),
        world_size=row.world_size,
        reading=Reading(),
        transformers=_release(row),
        assumptions=assumed,
    )


def _model(row: StepRow) -> str:
    name = published(row["model"])
    if name is None:
        raise IncompleteError(f"the published shapes of {row['model']} are not in this report")
    return name


def _dtype(row: StepRow) -> str:
    told = row["precision"].lower()
    for words, dtype in (("bfloat16", "bfloat16"), ("bf16", "bfloat16"), ("fp16", "float16")):
        if words in told:
            return dtype
    if told.startswith("fp32"):
        return "float32"
    raise IncompleteError(f"which precision {row['precision']!r} is")


def _input(row: StepRow) -> list[int]:
    told = row["seq_or_image"]
    sizes = [int(part) for part in re.split(r"[x ]", told) if part.isdigit()]
    if len(sizes) not in (1, 2):
        raise IncompleteError(f"the input is given as {told!r}")
    return sizes


_MERGED = {"28802": "4.41", "33298": "4.46", "31031": "4.42", "32092": "4.45"}
"""The first release with a pull request that measured its own code."""


_LATER = ("flash-attn 2.7", "4.48")
"""The requirements with flash-attn 2.7 have transformers 4.48.1, those with 2.6 have 4.45.2."""


def _release(row: StepRow) -> str:
    """Return the release of transformers that a row was measured with."""
    if _LATER[0] in row["torch"]:
        return _LATER[1]
    request = re.search(r"PR (\d+)", row["url_or_repo_path"])
    if request and request[1] in _MERGED:
        return _MERGED[request[1]]
    told = row["torch"].partition("transformers")[2].partition(",")[0]
    found = re.findall(r"\b(\d\.\d+)", told)
    if found:
        return found[-1]
    if "requirements_granite" in row["torch"]:
        return "4.45"
    raise IncompleteError("which release of transformers ran")
