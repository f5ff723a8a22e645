"""Options that several commands share, and their help."""

from __future__ import annotations

import argparse

from autobatch.workload.optimizers import OPTIMIZERS

__all__ = [
    "JSON_HELP",
    "SPEC_HELP",
    "add_isolation",
    "add_objective",
    "add_question",
    "add_report",
    "add_time_limit",
    "add_workload_options",
]

SPEC_HELP = (
    "file.py:function or package.module:function (returns a model or a Workload), timm:NAME, "
    "torchvision:NAME, or hf:TYPE such as hf:gpt2?seq=1024"
)
JSON_HELP = "write the answer as JSON; - prints only JSON on stdout"


def add_question(parser: argparse.ArgumentParser, headroom: str) -> None:
    """Add what is trained, its effective batch, and the headroom, whose default is said."""
    parser.add_argument("spec", metavar="SPEC", help=SPEC_HELP)
    parser.add_argument(
        "--target", type=int, required=True, metavar="N", help="effective batch per update"
    )
    parser.add_argument(
        "--headroom",
        type=float,
        metavar="SHARE",
        help=f"share of the usable memory to leave free (default: {headroom})",
    )


def add_objective(parser: argparse.ArgumentParser) -> None:
    """Add which of the micro-batches that fit is planned."""
    parser.add_argument(
        "--objective",
        choices=["largest", "fastest", "balanced"],
        default="largest",
        help="which micro-batch of those that fit: the largest (default), the fastest, or the "
        "smallest within 3 %% of the fastest; on a simulated GPU, time is an estimate",
    )


def add_time_limit(parser: argparse.ArgumentParser) -> None:
    """Add how long a trial on a real GPU may take."""
    parser.add_argument(
        "--time-limit",
        type=float,
        default=900.0,
        metavar="S",
        help="seconds that one trial may take on the GPU in this machine (default 900)",
    )


def add_report(parser: argparse.ArgumentParser) -> None:
    """Add the folder of the report."""
    parser.add_argument("--report", metavar="DIR", help="write the report into this folder")


def add_isolation(parser: argparse.ArgumentParser) -> None:
    """Add the choice to run the user's code in this process."""
    parser.add_argument(
        "--no-isolate",
        action="store_true",
        help="run your code in this process, as a debugger needs it, not in a child",
    )


def add_workload_options(parser: argparse.ArgumentParser, *, gpu: bool = True) -> None:
    """Add how a workload trains and, where `gpu` asks for it, on which card."""
    if gpu:
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
    parser.add_argument("--optimizer", choices=sorted(OPTIMIZERS), help="default: adamw")
    parser.add_argument("--autocast", choices=["bf16", "fp16"], help="mixed precision")
    parser.add_argument(
        "--clip-norm", type=float, metavar="X", help="clip the gradient norm to this"
    )
    parser.add_argument("--json", metavar="FILE", help=JSON_HELP)
    add_isolation(parser)
