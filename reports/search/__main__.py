"""Check that the ceiling of the search is the true one.

    python -m reports.search [--json FILE] [names ...]
    python -m reports.search --random N --seed S [--json FILE]
    python -m reports.search bench [--table ceilings|finders] [--match GLOB] [--render]

Every ceiling n is compared with direct execution on the virtual GPU: n fits, n + 1 does not. Exit
code 1 if a ceiling is wrong, or if it took more than 3 executions (4 where memory is quadratic in
the micro-batch, or where kernels take scratch memory at large sizes that they do not take at small
ones) or an out-of-memory error.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch

from autobatch import __version__
from autobatch.errors import AutobatchError
from autobatch.gpus.catalogue import CATALOGUE, GpuSpec, find_gpu
from autobatch.support.units import MIB
from autobatch.workload.infer.infer import infer
from autobatch.workload.workload import Workload
from reports.common.results import today
from reports.common.zoo import build, random_names
from reports.search.check import HEADER, Row, check, markdown
from reports.search.models import CASES

SMALLEST_BYTES, LARGEST_BYTES = 4096 * MIB, 80_000 * MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A model on which the search could not run."""

    model: str
    gpu: str
    error: str
    passes: bool = False


def own_models(names: Sequence[str]) -> Iterator[Row | Failure]:
    """Check the models of this report, or those that are named."""
    for case in CASES:
        if names and case.name not in names:
            continue
        workload = case.build()
        for gpu in case.gpus:
            yield _checked(case.name, case.what, partial(replace, workload), find_gpu(gpu))


def random_models(count: int, seed: int) -> Iterator[Row | Failure]:
    """Check random models of timm on random cards: one of the catalogue with another capacity."""
    chance = random.Random(seed)
    for name in random_names(count, seed):
        autocast = chance.choice([None, "bf16", "fp16"])
        clip_norm = chance.choice([None, 1.0])
        optimizer = chance.choice([torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop])
        clipped = ", clipped" if clip_norm else ""
        yield _checked(
            name,
            f"{optimizer.__name__}, {autocast or 'fp32'}{clipped}",
            partial(_timm_workload, name, autocast, clip_norm, optimizer),
            _random_card(chance),
        )


def _timm_workload(
    name: str,
    autocast: str | None,
    clip_norm: float | None,
    optimizer: type[torch.optim.Optimizer],
) -> Workload:
    model = build(name)
    inferred = infer(model)
    return Workload(
        model=model,
        batch=inferred.batch,
        loss=inferred.loss,
        autocast=autocast,
        clip_norm=clip_norm,
        optimizer=optimizer,
    )


def _checked(name: str, what: str, make: Callable[[], Workload], gpu: GpuSpec) -> Row | Failure:
    try:
        return check(name, what, make(), gpu)
    except AutobatchError as error:
        return Failure(model=name, gpu=gpu.name, error=f"{type(error).__name__}: {error}")


def _random_card(chance: random.Random) -> GpuSpec:
    capacity_bytes = int(SMALLEST_BYTES * (LARGEST_BYTES / SMALLEST_BYTES) ** chance.random())
    like = chance.choice(list(CATALOGUE.values()))
    return replace(
        like, name=f"{like.name} with {capacity_bytes // MIB} MiB", capacity_bytes=capacity_bytes
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the check; return the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["bench"]:
        from reports.search.bench import main as bench  # the other commands need no bench

        return bench(words[1:])
    parser = argparse.ArgumentParser(prog="python -m reports.search", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    known = [case.name for case in CASES]
    parser.add_argument(
        "names", nargs="*", help=f"models to check: {', '.join(known)}; all if none"
    )
    parser.add_argument(
        "--random", type=int, metavar="N", help="check N random timm models instead"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="draw them with this seed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures as JSON")
    options = parser.parse_args(words)
    if unknown := set(options.names) - set(known):
        parser.error(f"no model {', '.join(sorted(unknown))} here: use {', '.join(known)}")
    drawn = options.random is not None
    results = random_models(options.random, options.seed) if drawn else own_models(options.names)
    rows: list[Row | Failure] = []
    print(HEADER)
    for row in results:
        rows.append(row)
        print(markdown(row) if isinstance(row, Row) else f"{row.model}: {row.error}", flush=True)
    wrong = [row for row in rows if not row.passes]
    print(
        f"\n{len(rows) - len(wrong)} of {len(rows)} ceilings are true and took no more than allowed"
    )
    for row in wrong:
        print(row)
    if options.json:
        options.json.write_text(json.dumps(_document(rows, options), indent=2) + "\n")
    return 1 if wrong else 0


def _document(rows: Sequence[Row | Failure], options: argparse.Namespace) -> dict[str, object]:
    given = options.names if options.random is None else _random_arguments(options)
    return {
        "evidence": "simulated",
        "command": " ".join(("python -m reports.search", *given)),
        "versions": {"autobatch": __version__, "torch": torch.__version__},
        "date": today(),
        "rows": [asdict(row) | {"passes": row.passes} for row in rows],
    }


def _random_arguments(options: argparse.Namespace) -> list[str]:
    return ["--random", str(options.random), "--seed", str(options.seed)]


if __name__ == "__main__":
    sys.exit(main())
