"""GPU memory auto-tuner for PyTorch: which micro-batch fits, and where every byte goes.

>>> import autobatch
>>> autobatch.find_gpu("A100 40GB").name
'a100-40gb'
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from autobatch._version import __version__ as __version__

if TYPE_CHECKING:  # what editors and type checkers see; `_HOMES` is what runs
    from autobatch.accumulate.window import Window as Window
    from autobatch.accumulate.windows import Windows as Windows
    from autobatch.accumulate.windows import windows as windows
    from autobatch.choosing.compare import compare as compare
    from autobatch.choosing.comparison import Comparison as Comparison
    from autobatch.choosing.frontier import Frontier as Frontier
    from autobatch.choosing.sweep import sweep as sweep
    from autobatch.choosing.swept import Sweep as Sweep
    from autobatch.choosing.vary import vary as vary
    from autobatch.equivalence.check import check_equivalence as check_equivalence
    from autobatch.equivalence.result import Equivalence as Equivalence
    from autobatch.errors import AutobatchError as AutobatchError
    from autobatch.errors import AutobatchWarning as AutobatchWarning
    from autobatch.errors import DoesNotFitError as DoesNotFitError
    from autobatch.errors import FileError as FileError
    from autobatch.errors import NoGpuError as NoGpuError
    from autobatch.errors import ProbeDiedError as ProbeDiedError
    from autobatch.errors import SampleError as SampleError
    from autobatch.errors import SpecError as SpecError
    from autobatch.errors import UnknownGpuError as UnknownGpuError
    from autobatch.errors import UsageError as UsageError
    from autobatch.errors import WorkloadError as WorkloadError
    from autobatch.gpus.catalogue import GpuSpec as GpuSpec
    from autobatch.gpus.catalogue import find_gpu as find_gpu
    from autobatch.plan.advice import Advice as Advice
    from autobatch.plan.plan import Plan as Plan
    from autobatch.records.footprint import Footprint as Footprint
    from autobatch.records.progress import Progress as Progress
    from autobatch.report.explanation import Explanation as Explanation
    from autobatch.report.explanation import explain as explain
    from autobatch.tuning.advise import advise as advise
    from autobatch.tuning.tuner import predict as predict
    from autobatch.tuning.tuner import tune as tune
    from autobatch.workload.sample import batch_builder as batch_builder
    from autobatch.workload.workload import Workload as Workload

_HOMES = {
    "autobatch.accumulate.window": "Window",
    "autobatch.accumulate.windows": "Windows windows",
    "autobatch.choosing.compare": "compare",
    "autobatch.choosing.comparison": "Comparison",
    "autobatch.choosing.frontier": "Frontier",
    "autobatch.choosing.sweep": "sweep",
    "autobatch.choosing.swept": "Sweep",
    "autobatch.choosing.vary": "vary",
    "autobatch.equivalence.check": "check_equivalence",
    "autobatch.equivalence.result": "Equivalence",
    "autobatch.errors": """
        AutobatchError AutobatchWarning DoesNotFitError FileError NoGpuError ProbeDiedError
        SampleError SpecError UnknownGpuError UsageError WorkloadError
    """,
    "autobatch.gpus.catalogue": "GpuSpec find_gpu",
    "autobatch.plan.advice": "Advice",
    "autobatch.plan.plan": "Plan",
    "autobatch.records.footprint": "Footprint",
    "autobatch.records.progress": "Progress",
    "autobatch.report.explanation": "Explanation explain",
    "autobatch.tuning.advise": "advise",
    "autobatch.tuning.tuner": "predict tune",
    "autobatch.workload.sample": "batch_builder",
    "autobatch.workload.workload": "Workload",
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names.split()}

__all__ = sorted((*_HOME_OF, "__version__"))


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that `import autobatch` costs next to nothing."""
    if name not in _HOME_OF:
        raise AttributeError(f"module 'autobatch' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Name what users may use, so that a plain interpreter completes it."""
    return __all__
