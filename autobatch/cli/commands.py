"""What each command does.

Invariant: output paths are proven writable before any work.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autobatch.cli.running import named_gpu, outputs, run_apart, subject, tell, workload_options
from autobatch.errors import FileError

if TYPE_CHECKING:
    from autobatch.equivalence.result import Equivalence
    from autobatch.gpus.catalogue import GpuSpec
    from autobatch.plan.plan import Plan
    from autobatch.records.footprint import Footprint
    from autobatch.records.progress import ProgressCallback

__all__ = ["check", "gpus", "predict", "probe", "report"]


def probe(arguments: argparse.Namespace) -> int | None:
    """Plan a run: micro-batch and accumulation steps for an effective batch."""
    if arguments.vary:
        from autobatch.cli import vary

        return vary.run(arguments)
    from autobatch.cli.terminal import follow
    from autobatch.report.content import summary

    with outputs(arguments):
        gpu = named_gpu(arguments)
        with follow(sys.stderr) as progress:
            plan = _plan(
                arguments,
                {
                    "target": arguments.target,
                    "headroom": arguments.headroom,
                    "prove": arguments.prove,
                    "objective": arguments.objective,
                    "gpu": gpu,
                    **workload_options(arguments),
                },
                progress,
            )
        tell(arguments, plan, summary(plan))
    return None


def _plan(
    arguments: argparse.Namespace, options: dict[str, Any], progress: ProgressCallback
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
        partial(_tune_spec, arguments.spec, options, question),
        progress=progress,
        time_limit=arguments.time_limit if on_gpu else None,
        on_gpu=on_gpu,
    )


def _tune_spec(
    spec: str,
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

    plan = tune(partial(subject, spec), progress=progress, **options)
    if entry is not None:
        with suppress(FileError):  # the next probe takes as long as this one
            entry.store(plan)
    return plan


def _question(arguments: argparse.Namespace) -> dict[str, object]:
    """Return what a plan depends on, beside versions, settings and source files."""
    from autobatch.gpus.nvml import driver_version, installed_gpus

    names = (
        "spec target headroom prove objective gpu world_size sharding optimizer autocast clip_norm"
    )
    cards = [(gpu.index, gpu.name, gpu.total_bytes) for gpu in installed_gpus()]
    library, _, name = arguments.spec.partition(":")
    configs = sorted(Path(name.partition("?")[0]).glob("*.json")) if library == "hf" else ()
    return {
        **{name: getattr(arguments, name) for name in names.split()},
        "folder": os.getcwd(),
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


def predict(arguments: argparse.Namespace) -> None:
    """Account for the memory of one micro-batch."""
    from autobatch.cli.terminal import follow, show
    from autobatch.report.footprint_summary import footprint_summary
    from autobatch.support.files import check_writable, write_text

    if arguments.json and arguments.json != "-":
        check_writable(arguments.json)
    gpu = named_gpu(arguments)
    with follow(sys.stderr) as progress:
        options = {
            "micro_batch": arguments.micro_batch,
            "accumulation_steps": arguments.accumulation_steps,
            "gpu": gpu,
            **workload_options(arguments),
        }
        work = partial(_predict_spec, arguments.spec, options)
        footprint = run_apart(arguments, work, progress, on_gpu=False)
    if arguments.json == "-":
        sys.stdout.write(_footprint_json(footprint))
        return
    capacity_bytes = None if gpu is None or isinstance(gpu, str) else gpu.capacity_bytes
    show(footprint_summary(footprint, capacity_bytes), sys.stdout)
    if arguments.json:
        write_text(arguments.json, _footprint_json(footprint))


def _predict_spec(spec: str, options: dict[str, Any], *, progress: ProgressCallback) -> Footprint:
    from autobatch.tuning.tuner import predict

    return predict(partial(subject, spec), progress=progress, **options)


def check(arguments: argparse.Namespace) -> int:
    """Compare accumulated gradients with the whole batch's; 1 where they differ."""
    from autobatch.equivalence.result import equivalence_summary
    from autobatch.plan.plan import Plan
    from autobatch.records.progress import silent

    with outputs(arguments):
        options = {
            "plan": Plan.load(arguments.plan) if arguments.plan else None,
            "micro_batch": arguments.micro_batch,
            "accumulation_steps": arguments.accumulation_steps,
        }
        work = partial(_check_spec, arguments.spec, options)
        result = run_apart(arguments, work, silent, on_gpu=False)
        tell(arguments, result, equivalence_summary(result))
    return 0 if result.equivalent else 1


def _check_spec(spec: str, options: dict[str, Any], *, progress: ProgressCallback) -> Equivalence:
    from autobatch.equivalence.check import check_equivalence

    return check_equivalence(subject(spec), **options)


def gpus(arguments: argparse.Namespace) -> None:
    """List the catalogue, and the GPUs in this machine."""
    from autobatch.cli.terminal import show
    from autobatch.gpus.catalogue import CATALOGUE
    from autobatch.gpus.nvml import installed_gpus
    from autobatch.report.gpu_list import gpu_list

    show(gpu_list(CATALOGUE.values(), installed_gpus()), sys.stdout)


def report(arguments: argparse.Namespace) -> None:
    """Render a saved plan."""
    from autobatch.plan.plan import Plan

    plan = Plan.load(arguments.plan)
    source = Path(arguments.plan)
    print(f"report: {plan.report(arguments.out or source.with_name(f'{source.stem}-report'))}")


def _footprint_json(footprint: Footprint) -> str:
    from autobatch.records.codec import dump_json, encode
    from autobatch.records.plan_json import SCHEMA_VERSION

    header = {"schema_version": SCHEMA_VERSION, "peak_device_bytes": footprint.peak_device_bytes}
    return dump_json(header | encode(footprint))
