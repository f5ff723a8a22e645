"""Options that several commands share, and their help."""

from __future__ import annotations

import argparse
import math
import shutil
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

from autobatch.workload.optimizers import OPTIMIZERS

__all__ = [
    "JSON_HELP",
    "SPEC_HELP",
    "add_inputs",
    "add_isolation",
    "add_levers",
    "add_objective",
    "add_question",
    "add_report",
    "add_shown",
    "add_time_limit",
    "add_verb",
    "add_workload_options",
    "complete_gpus",
    "filled",
    "number",
]

SPEC_HELP = (
    "file.py:function or package.module:function (returns a model or a Workload), timm:NAME, "
    "torchvision:NAME, or hf:TYPE such as hf:gpt2?seq=1024"
)
JSON_HELP = "write the answer as JSON; - prints only JSON on stdout"


def number(text: str) -> float:
    """Read a number that is finite; no option means anything by another one.

    Raises:
        argparse.ArgumentTypeError: it is none; the parser says of which option.
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is no finite number")
    return value


def _seconds(text: str) -> float:
    """Read a time that can pass.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    value = number(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no time: give seconds, more than 0")
    return value


def add_verb(
    verbs: Any,
    name: str,
    run: Callable[[argparse.Namespace], int | None],
    *,
    help: str,
    usage: str,
    examples: Sequence[str],
    description: str = "",
) -> argparse.ArgumentParser:
    """Add a command to a parser's sub-parsers, with examples in its help.

    Args:
        verbs: the sub-parsers.
        name: of the command.
        run: what it does; the number that it returns is the exit code.
        help: its line in the list of commands.
        usage: what it needs, in the first line of its help.
        examples: what to type after `autobatch`, shown at the end of its help.
        description: what it does, where the line does not say it all.
    """
    lines = "\n".join(f"  autobatch {example}" for example in examples)
    parser: argparse.ArgumentParser = verbs.add_parser(
        name,
        usage=f"autobatch {name} {usage}".rstrip(),
        help=help,
        description=filled(description or f"{help[0].upper()}{help[1:]}."),
        epilog=f"examples:\n{lines}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def add_shown(parser: argparse.ArgumentParser) -> None:
    """Add what every command has: how much is shown, and the file of options."""
    said = parser.add_argument_group("what is shown")
    level = said.add_mutually_exclusive_group()
    # what is left out here may stand before the command
    level.add_argument(
        "-q",
        "--quiet",
        action="store_true",
        default=argparse.SUPPRESS,
        help="print the answer's first line alone, and no progress",
    )
    level.add_argument(
        "-v",
        "--verbose",
        action="store_true",
        default=argparse.SUPPRESS,
        help="keep every step of the progress, and say all that is known",
    )
    said.add_argument(
        "--debug",
        action="store_true",
        default=argparse.SUPPRESS,
        help="show the traceback of errors, and warnings of libraries",
    )
    said.add_argument(
        "--config",
        metavar="FILE.TOML",
        help="take options from a file: keys are their names; what is typed here wins",
    )


def filled(text: str) -> str:
    """Return running text in lines as wide as the terminal, as argparse wraps it."""
    return textwrap.fill(text, max(shutil.get_terminal_size().columns - 2, 20))


def complete_gpus(prefix: str, **_: Any) -> list[str]:
    """Return names of GPUs, also after a comma, for a shell that completes them.

    >>> complete_gpus("t4,a100-8")
    ['t4,a100-80gb']
    """
    from autobatch.gpus.catalogue import CATALOGUE

    before, comma, begun = prefix.rpartition(",")
    return [f"{before}{comma}{name}" for name in CATALOGUE if name.startswith(begun)]


def add_question(parser: argparse.ArgumentParser, headroom: str) -> None:
    """Add what is trained, its effective batch, and the headroom, whose default is said."""
    parser.add_argument("spec", metavar="SPEC", help=SPEC_HELP)
    parser.add_argument(
        "--target", type=int, required=True, metavar="N", help="effective batch per update"
    )
    parser.add_argument(
        "--headroom",
        type=number,
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
        type=_seconds,
        default=900.0,
        metavar="S",
        help="seconds that one trial may take on the GPU in this machine (default 900)",
    )


def add_report(parser: argparse.ArgumentParser) -> None:
    """Add the folder of the report, and the browser that shows it."""
    parser.add_argument("--report", metavar="DIR", help="write the report into this folder")
    parser.add_argument(
        "--open",
        action="store_true",
        help="open the report in a browser; without --report, it is in a temporary folder",
    )


def add_isolation(parser: argparse.ArgumentParser) -> None:
    """Add the choice to run the user's code in this process."""
    parser.add_argument(
        "--no-isolate",
        action="store_true",
        help="run your code in this process, as a debugger needs it, not in a child",
    )


def add_inputs(parser: argparse.ArgumentParser) -> None:
    """Add what a batch is, for models whose inputs are not inferred."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--input-shape",
        action="append",
        default=[],
        metavar="SHAPE",
        help="of one sample of each input: 3x224x224, int64:128 for tokens, int64 for a label, "
        "input_ids=int64:128 for a keyword; separated by commas, or repeated",
    )
    group.add_argument(
        "--sample",
        metavar="FILE",
        help="one batch: FILE.pt, which torch.save wrote, or file.py:function, which returns a "
        "batch, a Dataset or a DataLoader",
    )


def add_workload_options(
    parser: argparse.ArgumentParser, *, gpu: bool = True, inputs: bool = True
) -> None:
    """Add how a workload trains and, where that is asked for, on which card and on what batches."""
    how = parser.add_argument_group("how it is trained")
    if gpu:
        named: Any = parser.add_argument(
            "--gpu",
            metavar="NAME",
            help="GPU to simulate: a name from `autobatch gpus`, or a size such as 24GiB; a device "
            "such as cuda:1, by default the current one, is measured",
        )
        named.completer = complete_gpus
    if inputs:
        add_inputs(parser)
    how.add_argument(
        "--world-size",
        type=int,
        default=1,
        metavar="N",
        help="GPUs that share the effective batch (default 1)",
    )
    how.add_argument(
        "--sharding",
        choices=["ddp", "fsdp"],
        help="how they share the model: ddp (default for several) keeps whole copies, fsdp is "
        "FSDP2",
    )
    how.add_argument(
        "--optimizer",
        choices=sorted(OPTIMIZERS),
        metavar="NAME",
        help=f"default adamw; {', '.join(sorted(OPTIMIZERS))}",
    )
    how.add_argument("--clip-norm", type=number, metavar="X", help="clip the gradient norm to this")
    add_levers(how)
    parser.add_argument("--json", metavar="FILE", help=JSON_HELP)
    add_isolation(parser)


def add_levers(how: Any) -> None:
    """Add what changes the model that is trained, or its number format, to a group of options."""
    formats = how.add_mutually_exclusive_group()
    formats.add_argument("--autocast", choices=["bf16", "fp16"], help="the same as --precision")
    formats.add_argument(
        "--precision",
        choices=["fp32", "tf32", "bf16", "fp16", "bf16-pure"],
        metavar="FORMAT",
        help="fp32, tf32, bf16, fp16 or bf16-pure: bf16 and fp16 are autocast, bf16-pure keeps the "
        "weights in bf16, too",
    )
    how.add_argument(
        "--activation-checkpointing",
        nargs="?",
        const="full",
        metavar="HOW",
        help="recompute activations in the backward pass: full (every block, also without a word), "
        "selective, every=2 (every 2nd block), or none",
    )
    how.add_argument(
        "--lora",
        metavar="r=N",
        help="freeze the model and train LoRA's matrices of this rank: r=16, or "
        "r=16,targets=q_proj,v_proj",
    )
