"""GPU memory auto-tuner for PyTorch: which micro-batch fits, and where every byte goes.

>>> import autobatch
>>> autobatch.find_gpu("A100 40GB").name
'a100-40gb'
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from autobatch._version import __version__

if TYPE_CHECKING:
    from autobatch.accumulate import Window, Windows, windows
    from autobatch.equivalence import Equivalence, check_equivalence
    from autobatch.errors import (
        AutobatchError,
        AutobatchWarning,
        DoesNotFitError,
        FileError,
        NoGpuError,
        ProbeDiedError,
        SampleError,
        SpecError,
        UnknownGpuError,
        UsageError,
        WorkloadError,
    )
    from autobatch.gpus.catalogue import GpuSpec, find_gpu
    from autobatch.plan.plan import Plan
    from autobatch.records.footprint import Footprint
    from autobatch.records.progress import Progress
    from autobatch.tuning.tuner import predict, tune
    from autobatch.workload.sample import batch_builder
    from autobatch.workload.workload import Workload

_HOMES = {
    "autobatch.accumulate": ("Window", "Windows", "windows"),
    "autobatch.equivalence": ("Equivalence", "check_equivalence"),
    "autobatch.errors": (
        "AutobatchError",
        "AutobatchWarning",
        "DoesNotFitError",
        "FileError",
        "NoGpuError",
        "ProbeDiedError",
        "SampleError",
        "SpecError",
        "UnknownGpuError",
        "UsageError",
        "WorkloadError",
    ),
    "autobatch.records.footprint": ("Footprint",),
    "autobatch.gpus.catalogue": ("GpuSpec", "find_gpu"),
    "autobatch.plan.plan": ("Plan",),
    "autobatch.records.progress": ("Progress",),
    "autobatch.workload.sample": ("batch_builder",),
    "autobatch.tuning.tuner": ("predict", "tune"),
    "autobatch.workload.workload": ("Workload",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "AutobatchError",
    "AutobatchWarning",
    "DoesNotFitError",
    "Equivalence",
    "FileError",
    "Footprint",
    "GpuSpec",
    "NoGpuError",
    "Plan",
    "ProbeDiedError",
    "Progress",
    "SampleError",
    "SpecError",
    "UnknownGpuError",
    "UsageError",
    "Window",
    "Windows",
    "Workload",
    "WorkloadError",
    "__version__",
    "batch_builder",
    "check_equivalence",
    "find_gpu",
    "predict",
    "tune",
    "windows",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that `import autobatch` costs next to nothing."""
    if name not in _HOME_OF:
        raise AttributeError(f"module 'autobatch' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value
