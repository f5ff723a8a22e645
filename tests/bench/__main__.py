"""Run a program on simulated cards.

python -m tests.bench [-g CARD] [-c CAPACITY] [-n CARDS] PROGRAM [ARGUMENT...]
"""

from __future__ import annotations

import argparse
import subprocess

from autobatch.errors import AutobatchError
from tests.bench.card import environment
from tests.bench.cards import MODELS


def main() -> int:
    """Run the program; return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("-g", "--gpu", default="a100-40gb", help=", ".join(MODELS))
    parser.add_argument("-c", "--capacity", help="of each card, such as 8GiB")
    parser.add_argument("-n", "--cards", type=int, default=1, help="how many, all of one kind")
    parser.add_argument("program", nargs=argparse.REMAINDER, help="with its arguments")
    asked = parser.parse_args()
    if not asked.program:
        parser.error("which program?")
    try:
        variables = environment(gpu=asked.gpu, capacity=asked.capacity, cards=asked.cards)
    except (AutobatchError, RuntimeError, ValueError) as problem:
        parser.error(str(problem))
    return subprocess.run(asked.program, env=variables).returncode


if __name__ == "__main__":
    raise SystemExit(main())
