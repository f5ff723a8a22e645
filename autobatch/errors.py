"""Every error a user can meet, in one tree.

    AutobatchError                 exit code 1
    ├── UsageError (ValueError)    exit code 2: the request cannot be understood
    │   ├── UnknownGpuError        the GPU's name is not in the catalogue
    │   ├── NoGpuError             no GPU in the machine and none named
    │   ├── SampleError            no inputs inferred, or no batch dimension in the sample
    │   ├── SpecError              a SPEC names no file, module or function
    │   └── FileError              an unreadable file, an unwritable folder
    ├── WorkloadError              exit code 1: the user's own model, loss or optimizer failed
    │   ├── HostMemoryError        a step needs more host memory than there is
    │   └── LeverError             a lever cannot be had with this model or micro-batch
    ├── ProbeDiedError             exit code 1: the process of the probe crashed or hung
    └── DoesNotFitError            exit code 3: not even micro-batch 1 fits

Messages say what happened, the numbers, and what to try, in one line.
"""

from __future__ import annotations

__all__ = [
    "AutobatchError",
    "AutobatchWarning",
    "DoesNotFitError",
    "FileError",
    "HostMemoryError",
    "NoGpuError",
    "ProbeDiedError",
    "SampleError",
    "SpecError",
    "UnknownGpuError",
    "UsageError",
    "WorkloadError",
]


class AutobatchError(Exception):
    """Any failure that autobatch reports on purpose."""

    exit_code = 1


class AutobatchWarning(UserWarning):
    """Something that autobatch changed or noticed, and goes on with."""


class UsageError(AutobatchError, ValueError):
    """The request itself cannot be understood or carried out."""

    exit_code = 2


class UnknownGpuError(UsageError):
    """The GPU's name is not in the catalogue."""


class NoGpuError(UsageError):
    """The machine has no GPU and the caller named none."""


class SampleError(UsageError):
    """No inputs can be inferred, or the sample has no batch dimension."""


class SpecError(UsageError):
    """A SPEC names no file, module or function that can be used."""


class FileError(UsageError):
    """A file cannot be read or written, or holds what it must not."""


class WorkloadError(AutobatchError):
    """The user's model, loss or optimizer failed; the cause is chained with its traceback."""


class LeverError(WorkloadError):
    """A lever cannot be had with this model or this micro-batch; without it, nothing is wrong."""


class HostMemoryError(WorkloadError):
    """A step needs more memory of the host than there is: SciPy copied a tensor, say."""


class ProbeDiedError(AutobatchError):
    """The process of the probe crashed, ended early or hung; its log is kept."""


class DoesNotFitError(AutobatchError):
    """Not even one sample fits into the budget."""

    exit_code = 3
