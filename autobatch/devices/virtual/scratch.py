"""What a kernel allocates beside its results, and gives back before it returns.

A rule says it in steps, in the order of the kernel's code: a number takes so many bytes, `~i` gives
back the piece that was taken as number i, `RESULT` stands for the allocation of the next result and
`RESULTS` for that of all that are left. Any other text names the pieces that follow, for reports.
What is not given back is when the kernel ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

__all__ = ["RESULT", "RESULTS", "Step", "Steps"]

RESULT: Final = "result"
RESULTS: Final = "results"

Step = int | str
Steps = Sequence[Step]
