"""Which micro-batches a search executes first.

On a simulated card one is enough, if it tells which sizes come from the samples: a prime that
divides no dimension of the model divides, with few exceptions, what grows with the micro-batch and
nothing else.
"""

from __future__ import annotations

from contextlib import suppress
from itertools import chain

from autobatch.devices.copies import batch_of
from autobatch.workload.sample import Built
from autobatch.workload.tree import tensors
from autobatch.workload.workload import Workload
from autobatch.workload.wrappers import unwrapped

__all__ = ["SMALL", "first_size"]

SMALL = (2, 3)
"""Where the search begins with two sizes: at 1 the order of events often differs (squeezed
dimensions)."""

_PRIMES = (23, 31, 29, 41, 19, 47, 53, 17, 37, 13, 11)
"""Those that are rarely a factor of feature maps and lengths come first, but for large ones, which
take long where the user's code goes through samples one by one."""


def first_size(workload: Workload) -> int:
    """Return the size that a simulation executes first: a prime, or the smaller one of two.

    The prime divides no dimension of the model's tensors and of a batch, and there may be none.
    Where samples are no rows of tensors, code goes through them one by one, or they have different
    sizes, so that one size tells nothing of others.

    >>> import torch
    >>> from torch import nn
    >>> first_size(Workload(model=nn.Linear(64, 46), batch=lambda n: torch.zeros(n, 62, 64)))
    29
    """
    made = workload.batch
    if isinstance(made, Built) and not made.rows.layout.is_made_of_rows:
        return SMALL[0]
    model = unwrapped(workload.model)
    shapes = {each.shape for each in chain(model.parameters(), model.buffers())}
    # an error is told by the run, which also has the card that the function may ask for
    with suppress(Exception, SystemExit):
        shapes |= {each.shape for each in tensors(batch_of(made, SMALL[0]))}
    dims = {dim for shape in shapes for dim in shape if dim}
    fitting = (prime for prime in _PRIMES if all(dim % prime for dim in dims))
    return next(fitting, SMALL[0])
