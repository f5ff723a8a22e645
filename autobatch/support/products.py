"""How float32 matrix products are computed: a setting of the process that has two names.

`torch.get_float32_matmul_precision` fails once `torch.backends.cuda.matmul.fp32_precision` was set
to another thing; the second can always be read.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch

__all__ = ["are_in_tf32", "products_in_tf32"]


def are_in_tf32() -> bool:
    """Return whether float32 matrix products run in TF32 on cards that have it.

    >>> with products_in_tf32(True):
    ...     are_in_tf32()
    True
    """
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")


@contextmanager
def products_in_tf32(wanted: bool) -> Iterator[None]:
    """Let float32 matrix products run in TF32, or not, in a block; afterwards all is as before."""
    products = torch.backends.cuda.matmul
    before, named = products.fp32_precision, None
    with suppress(RuntimeError):  # the user has set the newer name to another thing
        named = torch.get_float32_matmul_precision()
    try:
        if are_in_tf32() != wanted:
            torch.set_float32_matmul_precision("high" if wanted else "highest")
        yield
    finally:
        if named is not None:
            torch.set_float32_matmul_precision(named)
        products.fp32_precision = before
