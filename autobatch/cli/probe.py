"""The command `probe`: a plan for an effective batch.

Invariant: output paths are proven writable before any work.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autobatch.cli import vary
from autobatch.cli.inputs import fingerprint
from autobatch.cli.options import (
    add_objective,
    add_question,
    add_report,
    add_time_limit,
    add_verb,
    add_workload_options,
)
from autobatch.cli.running import (
    Model,
    following,
    model_of,
    named_gpu,
    outputs,
    run_apart,
    tell,
    workload_options,
)
from autobatch.errors import FileError

if TYPE_CHECKING:
    from autobatch.gpus.catalogue import GpuSpec
    from autobatch.plan.plan import Plan
    from autobatch.records.progress import ProgressCallback

__all__ = ["add"]


def add(verbs: Any) -> None:
    """Add the command to a parser's sub-parsers."""
    parser = add_verb(
        verbs,
        "probe",
        _run,
        usage="SPEC --target N [options]",
        help="plan micro-batch and accumulation steps for an effective batch",
        description="Find the largest micro-batch that fits, the accumulation steps that make the "
        "effective batch exactly, and where every byte goes.",
        examples=[
            "probe hf:gpt2 --target 256 --gpu a100-40gb",
            "probe train.py:build --target 512 --gpu 24GiB --report out --open",
            "probe timm:resnet50 --target 1024 --gpu t4 --precision fp16",
            "probe model.py:Net --input-shape 3x224x224,int64 --target 64 --gpu rtx-4090",
            "probe hf:llama --target 64 --gpu a10g --lora r=16 --activation-checkpointing",
            "probe train.py:build --target 256               # on the GPU in this machine",
            "probe --config run.toml",
        ],
    )
    add_question(
        parser,
        headroom="0.05 where a GPU is measured; where it is simulated, what 95 of 100 published "
        "runs needed",
    )
    add_workload_options(parser)
    add_objective(parser)
    parser.add_argument("--prove", action="store_true", help="also run the size above the ceiling")
    parser.add_argument(
        "--no-cache",
        action="store_true",
        help="neither answer from the plan of an earlier probe, nor keep it",
    )
    add_time_limit(parser)
    vary.add_option(parser)
    add_report(parser)


def _run(arguments: argparse.Namespace) -> int | None:
    """Plan a run: micro-batch and accumulation steps for an effective batch."""
    if arguments.vary:
        return vary.run(arguments)
    from autobatch.report.content import full_report, summary

    with outputs(arguments, "plan"):
        gpu = named_gpu(arguments)
        options = {
            "target": arguments.target,
            "headroom": arguments.headroom,
            "prove": arguments.prove,
            "objective": arguments.objective,
            "gpu": gpu,
            **workload_options(arguments),
        }
        model = model_of(arguments, [gpu])
        with following(arguments) as progress:
            plan = replace(_plan(arguments, model, options, progress), command=arguments.command)
        tell(arguments, plan, full_report(plan) if arguments.verbose else summary(plan))
    return None


def _plan(
    arguments: argparse.Namespace,
    model: Model,
    options: dict[str, Any],
    progress: ProgressCallback,
) -> Plan:
    """Answer from the plan of an earlier probe where that needs no GPU, else tune."""
    from autobatch.gpus.catalogue import is_device
    from autobatch.tuning.cache import named_entry

    question = None if arguments.no_cache else _question(arguments)
    on_gpu = is_device(options["gpu"])
    entry = None if question is None or on_gpu else named_entry(question)
    known = None if entry is None else entry.find()
    if known is not None:
        return known
    return run_apart(
        arguments,
        partial(_tune, model, options, question),
        progress=progress,
        time_limit=arguments.time_limit if on_gpu else None,
        on_gpu=on_gpu,
    )


def _tune(
    model: Model,
    options: dict[str, Any],
    question: Mapping[str, object] | None,
    *,
    progress: ProgressCallback,
) -> Plan:
    """Answer from the plan of an earlier probe where there is one, else tune."""
    from autobatch.tuning.cache import named_entry

    entry = None if question is None else named_entry(question)
    known = entry.find() if entry is not None else None
    if known is not None and _still_holds(known, options["gpu"]):
        return known
    from autobatch.tuning.tuner import tune

    plan = tune(model, progress=progress, **options)
    if entry is not None:
        with suppress(FileError):  # the next probe takes as long as this one
            entry.store(plan)
    return plan


def _question(arguments: argparse.Namespace) -> dict[str, object]:
    """Return what a plan depends on, beside versions, settings and source files."""
    from autobatch.gpus.nvml import driver_version, installed_gpus

    names = (
        "spec target headroom prove objective gpu world_size sharding optimizer autocast clip_norm "
        "input_shape sample precision activation_checkpointing lora"
    )
    cards = [(gpu.index, gpu.name, gpu.total_bytes) for gpu in installed_gpus()]
    library, _, name = arguments.spec.partition(":")
    configs = sorted(Path(name.partition("?")[0]).glob("*.json")) if library == "hf" else ()
    return {
        **{name: getattr(arguments, name) for name in names.split()},
        "folder": os.getcwd(),
        "sample_file": fingerprint(arguments.sample),
        "configs": {str(file): file.read_text(encoding="utf-8") for file in configs},
        "cards": cards,
        "driver": driver_version(),
    }


def _still_holds(plan: Plan, gpu: GpuSpec | str | None) -> bool:
    """Say whether a card in this machine has as much memory left as the plan was made with."""
    from autobatch.gpus.catalogue import is_device

    if not is_device(gpu):
        return True
    from autobatch.devices.choose import choose_device
    from autobatch.tuning.question import holds

    return holds(plan, choose_device(gpu))
