"""The command line.

Invariant: this is the only place where errors become messages and exit codes. The answer goes to
stdout, progress and errors to stderr; output paths are proven writable before any work.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autobatch._version import __version__
from autobatch.errors import AutobatchError, WorkloadError
from autobatch.support import process

if TYPE_CHECKING:
    from torch import nn

    from autobatch.gpus.catalogue import GpuSpec
    from autobatch.plan.plan import Plan
    from autobatch.records.footprint import Footprint
    from autobatch.records.progress import ProgressCallback
    from autobatch.workload.workload import OptimizerSpec, Workload

__all__ = ["entry", "main"]

_SPEC_HELP = (
    "file.py:function or package.module:function (returns a model or a Workload), timm:NAME, "
    "torchvision:NAME, or hf:TYPE such as hf:gpt2?seq=1024"
)
_JSON_HELP = "write the answer as JSON; - prints only JSON on stdout"
_OPTIMIZERS = {
    "adadelta": "Adadelta",
    "adafactor": "Adafactor",
    "adagrad": "Adagrad",
    "adam": "Adam",
    "adamax": "Adamax",
    "adamw": "AdamW",
    "nadam": "NAdam",
    "radam": "RAdam",
    "rmsprop": "RMSprop",
    "sgd": "SGD",
    "sgd-momentum": "SGD",
}
_BROKEN_PIPE, _INTERRUPTED = 141, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    0: done, 1: the workload failed, or `check` found the gradients different, 2: usage, 3: nothing
    fits, 130: interrupted.
    """
    try:
        arguments = _parser().parse_args(argv)
        code: int | None = arguments.run(arguments)
        sys.stdout.flush()
    except SystemExit as exit_:  # argparse has printed its message
        return exit_.code if isinstance(exit_.code, int) else 2
    except AutobatchError as error:
        if isinstance(error, WorkloadError) and error.__cause__ is not None:
            traceback.print_exception(error.__cause__)
        print(f"autobatch: error: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE
    except KeyboardInterrupt:
        return _INTERRUPTED
    return code or 0


def entry() -> None:
    """Run the command line of this process; a terminal that lacks a character shows a `?`."""
    process.claim()
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    sys.exit(main())


def _probe(arguments: argparse.Namespace) -> None:
    from autobatch.cli.terminal import follow, show
    from autobatch.report.document import summary
    from autobatch.support.files import check_writable, prepare_folder

    if arguments.report:
        prepare_folder(arguments.report)
    if arguments.json and arguments.json != "-":
        check_writable(arguments.json)
    gpu = _gpu(arguments)
    with follow(sys.stderr) as progress:
        plan = _plan(
            arguments,
            {
                "target": arguments.target,
                "headroom": arguments.headroom,
                "prove": arguments.prove,
                "cache": "confirm" if arguments.confirm else not arguments.no_cache,
                "gpu": gpu,
                **_options(arguments),
            },
            progress,
        )
    if arguments.json == "-":
        sys.stdout.write(plan.to_json())
    else:
        show(summary(plan), sys.stdout)
    if arguments.json and arguments.json != "-":
        plan.save(arguments.json)
    if arguments.report:
        _say_where(plan.report(arguments.report), to_stderr=arguments.json == "-")


def _plan(
    arguments: argparse.Namespace, options: dict[str, Any], progress: ProgressCallback
) -> Plan:
    """Tune here where the GPU is simulated, in a child process where it is real."""
    from autobatch.gpus.catalogue import is_device

    if not is_device(options["gpu"]) or arguments.no_isolate:
        return _tune_spec(arguments.spec, options, progress=progress)
    from autobatch.tuning.isolation import apart

    return apart(
        _tune_spec, arguments.spec, options, progress=progress, time_limit=arguments.time_limit
    )


def _tune_spec(spec: str, options: dict[str, Any], *, progress: ProgressCallback) -> Plan:
    from autobatch.tuning.tuner import tune

    return tune(_subject(spec), progress=progress, **options)


def _predict(arguments: argparse.Namespace) -> None:
    from autobatch.cli.terminal import follow, show
    from autobatch.report.document import footprint_summary
    from autobatch.support.files import check_writable, write_text

    if arguments.json and arguments.json != "-":
        check_writable(arguments.json)
    gpu = _gpu(arguments)
    with follow(sys.stderr) as progress:
        from autobatch.tuning.tuner import predict

        footprint = predict(
            _subject(arguments.spec),
            micro_batch=arguments.micro_batch,
            accumulation_steps=arguments.accumulation_steps,
            gpu=gpu,
            progress=progress,
            **_options(arguments),
        )
    if arguments.json == "-":
        sys.stdout.write(_footprint_json(footprint))
        return
    capacity_bytes = None if gpu is None or isinstance(gpu, str) else gpu.capacity_bytes
    show(footprint_summary(footprint, capacity_bytes), sys.stdout)
    if arguments.json:
        write_text(arguments.json, _footprint_json(footprint))


def _check(arguments: argparse.Namespace) -> int:
    from autobatch.cli.terminal import show
    from autobatch.equivalence import check_equivalence
    from autobatch.equivalence.result import equivalence_summary
    from autobatch.plan.plan import Plan
    from autobatch.support.files import check_writable, write_text

    if arguments.json and arguments.json != "-":
        check_writable(arguments.json)
    result = check_equivalence(
        _subject(arguments.spec),
        plan=Plan.load(arguments.plan) if arguments.plan else None,
        micro_batch=arguments.micro_batch,
        accumulation_steps=arguments.accumulation_steps,
    )
    if arguments.json == "-":
        sys.stdout.write(result.to_json())
    else:
        show(equivalence_summary(result), sys.stdout)
        if arguments.json:
            write_text(arguments.json, result.to_json())
    return 0 if result.equivalent else 1


def _gpus(arguments: argparse.Namespace) -> None:
    from autobatch.cli.terminal import show
    from autobatch.gpus.catalogue import CATALOGUE
    from autobatch.gpus.nvml import installed_gpus
    from autobatch.report.document import gpu_list

    show(gpu_list(CATALOGUE.values(), installed_gpus()), sys.stdout)


def _report(arguments: argparse.Namespace) -> None:
    from autobatch.plan.plan import Plan

    plan = Plan.load(arguments.plan)
    source = Path(arguments.plan)
    _say_where(plan.report(arguments.out or source.with_name(f"{source.stem}-report")))


def _subject(spec: str) -> nn.Module | Workload:
    from autobatch.workload.spec.load import load_spec

    return load_spec(spec)


def _gpu(arguments: argparse.Namespace) -> GpuSpec | str | None:
    """Return the card to simulate, or the device of this machine that is named."""
    from autobatch.gpus.catalogue import find_gpu, is_device

    named: str | None = arguments.gpu
    return named if named is None or is_device(named) else find_gpu(named)


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "optimizer": _optimizer(arguments.optimizer),
        "world_size": arguments.world_size,
        "sharding": arguments.sharding,
        "autocast": arguments.autocast,
        "clip_norm": arguments.clip_norm,
    }


def _optimizer(name: str | None) -> OptimizerSpec | None:
    if name is None:
        return None
    import torch

    kind: OptimizerSpec = getattr(torch.optim, _OPTIMIZERS[name])
    return partial(torch.optim.SGD, momentum=0.9) if name == "sgd-momentum" else kind


def _footprint_json(footprint: Footprint) -> str:
    from autobatch.records.codec import dump_json, encode
    from autobatch.records.plan_json import SCHEMA_VERSION

    header = {"schema_version": SCHEMA_VERSION, "peak_device_bytes": footprint.peak_device_bytes}
    return dump_json(header | encode(footprint))


def _say_where(page: Path, *, to_stderr: bool = False) -> None:
    print(f"report: {page}", file=sys.stderr if to_stderr else sys.stdout)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="autobatch",
        description="Find the micro-batch that fits a GPU, and where every byte of it goes.",
        epilog="Exit codes: 0 done, 1 the workload failed or the check found a difference, "
        "2 usage, 3 nothing fits.",
    )
    parser.add_argument("--version", action="version", version=f"autobatch {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    probe = commands.add_parser(
        "probe", help="plan micro-batch and accumulation steps for an effective batch"
    )
    probe.set_defaults(run=_probe)
    probe.add_argument("spec", metavar="SPEC", help=_SPEC_HELP)
    probe.add_argument(
        "--target", type=int, required=True, metavar="N", help="effective batch per update"
    )
    probe.add_argument(
        "--headroom",
        type=float,
        metavar="SHARE",
        help="share of the usable memory to leave free (default: 0.05 where a GPU is measured; "
        "where it is simulated, what 95 of 100 published runs needed)",
    )
    _add_workload_options(probe)
    probe.add_argument("--prove", action="store_true", help="also run the size above the ceiling")
    probe.add_argument(
        "--no-cache", action="store_true", help="probe again where nothing has changed"
    )
    probe.add_argument(
        "--confirm", action="store_true", help="run a plan from the cache once before answering"
    )
    probe.add_argument(
        "--no-isolate",
        action="store_true",
        help="probe the GPU in this machine in this process, not in a child of it",
    )
    probe.add_argument(
        "--time-limit",
        type=float,
        default=900.0,
        metavar="S",
        help="seconds that one trial may take on the GPU in this machine (default 900)",
    )
    probe.add_argument("--report", metavar="DIR", help="write the report into this folder")

    predict = commands.add_parser("predict", help="account for the memory of one micro-batch")
    predict.set_defaults(run=_predict)
    predict.add_argument("spec", metavar="SPEC", help=_SPEC_HELP)
    predict.add_argument("--micro-batch", type=int, required=True, metavar="N")
    predict.add_argument("--accumulation-steps", type=int, default=1, metavar="K")
    _add_workload_options(predict)

    check = commands.add_parser(
        "check", help="compare accumulated gradients with those of the whole batch, on the CPU"
    )
    check.set_defaults(run=_check)
    check.add_argument("spec", metavar="SPEC", help=_SPEC_HELP)
    check.add_argument("--micro-batch", type=int, metavar="N", help="default 4")
    check.add_argument("--accumulation-steps", type=int, metavar="K", help="default 2")
    check.add_argument(
        "--plan", metavar="PLAN.JSON", help="compare this plan's window, or a smaller one like it"
    )
    check.add_argument("--json", metavar="FILE", help=_JSON_HELP)

    gpus = commands.add_parser("gpus", help="list the known GPUs and those in this machine")
    gpus.set_defaults(run=_gpus)

    report = commands.add_parser("report", help="render a saved plan again, without a GPU")
    report.set_defaults(run=_report)
    report.add_argument("plan", metavar="PLAN.JSON")
    report.add_argument("--out", metavar="DIR", help="folder (default: PLAN-report beside it)")
    return parser


def _add_workload_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--gpu",
        metavar="NAME",
        help="GPU to simulate: a name from `autobatch gpus`, or a size such as 24GiB; a device "
        "such as cuda:1, by default the current one, is measured",
    )
    parser.add_argument(
        "--world-size",
        type=int,
        default=1,
        metavar="N",
        help="GPUs that share the effective batch (default 1)",
    )
    parser.add_argument(
        "--sharding",
        choices=["ddp", "fsdp"],
        help="what they share: ddp (default for several) keeps whole copies, fsdp is FSDP2",
    )
    parser.add_argument("--optimizer", choices=sorted(_OPTIMIZERS), help="default: adamw")
    parser.add_argument("--autocast", choices=["bf16", "fp16"], help="mixed precision")
    parser.add_argument(
        "--clip-norm", type=float, metavar="X", help="clip the gradient norm to this"
    )
    parser.add_argument("--json", metavar="FILE", help=_JSON_HELP)
