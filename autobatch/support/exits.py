"""User code that ends the process, as a failure of the workload."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from autobatch.errors import WorkloadError
from autobatch.support.wording import said_by

__all__ = ["exits_reported"]


@contextlib.contextmanager
def exits_reported(what: str) -> Iterator[None]:
    """Turn `sys.exit` in the block into an error: a script that asks for a plan has not ended.

    Raises:
        WorkloadError: the block ended the process.

    >>> try:
    ...     with exits_reported("the model"):
    ...         raise SystemExit(0)
    ... except WorkloadError as error:
    ...     str(error)[:54]
    'the model failed: it ended the process by sys.exit(0),'
    """
    try:
        yield
    except SystemExit as error:
        raise WorkloadError(f"{what} failed: {said_by(error)}") from error
