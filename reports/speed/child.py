"""Tune one model in this process, and print what it took as one line of JSON.

    python -m reports.speed.child SPEC GPU

`seconds` is that of `autobatch.tune` alone: imports and the construction of the model come before.
`cpu_seconds` is what the wall time would be on a machine that does nothing else, and
`import_torch_seconds` what PyTorch's own import took in the same process, in the same state of the
machine.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

TARGET = 256


def load(spec: str) -> nn.Module:
    """Build a model on `meta`; its inputs are inferred later, inside of what is timed."""
    from autobatch.workload.spec.load import load_spec
    from autobatch.workload.workload import Workload
    from reports.common.zoo import build

    prefix, _, name = spec.partition(":")
    if prefix == "timm":
        return build(name)
    named = load_spec(spec)
    return named.model if isinstance(named, Workload) else named


def main(arguments: Sequence[str]) -> int:
    """Tune and print; return the exit code."""
    spec, gpu = arguments
    warnings.simplefilter("ignore")
    importing = time.perf_counter()
    import torch  # noqa: F401

    import_torch_seconds = time.perf_counter() - importing
    import autobatch
    from reports.common.memory import peak_rss_bytes

    model = load(spec)
    tune = autobatch.tune  # imports the tuner
    started, cpu_started = time.perf_counter(), time.process_time()
    try:
        plan = tune(model, target=TARGET, gpu=gpu, cache=False)
    except autobatch.AutobatchError as error:
        outcome: dict[str, object] = {"error": f"{type(error).__name__}: {error}"}
    else:
        outcome = {
            "ceiling": plan.ceiling,
            "micro_batch": plan.micro_batch,
            "executions": plan.executions,
            "method": plan.method,
        }
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    measured: dict[str, object] = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu_seconds, 2),
        "import_torch_seconds": round(import_torch_seconds, 2),
        "peak_rss_bytes": peak_rss_bytes(),
    }
    print(json.dumps(measured | outcome))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
