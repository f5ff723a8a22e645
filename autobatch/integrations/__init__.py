"""Plans in the words of trainers, and tuning from inside of them.

Every library is imported by the module that bears its name and by no other. What a plan means for
a trainer is a plain dict of that trainer's own arguments; `Plan.to_lightning` and its siblings call
the functions here.

Invariant: no target is changed unless `nearest=True` was passed.
"""

from __future__ import annotations
