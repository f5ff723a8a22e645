"""Options that several commands share, and their help."""

from __future__ import annotations

import argparse

from autobatch.workload.optimizers import OPTIMIZERS

__all__ = ["JSON_HELP", "SPEC_HELP", "add_isolation", "add_workload_options"]

SPEC_HELP = (
    "file.py:function or package.module:function (returns a model or a Workload), timm:NAME, "
    "torchvision:NAME, or hf:TYPE such as hf:gpt2?seq=1024"
)
JSON_HELP = "write the answer as JSON; - prints only JSON on stdout"


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
