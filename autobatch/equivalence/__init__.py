"""Is the accumulated gradient that of the whole batch, and if not, why?

>>> result = check_equivalence(model, sample, plan)  # doctest: +SKIP
>>> result.equivalent, result.culprits  # doctest: +SKIP
"""

from autobatch.equivalence.check import check_equivalence
from autobatch.equivalence.result import Comparison, Culprit, Equivalence

__all__ = ["Comparison", "Culprit", "Equivalence", "check_equivalence"]
