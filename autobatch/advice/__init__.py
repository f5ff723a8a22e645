"""What a plan means for training: pure functions from a plan to facts, sentences and code.

Invariant: every figure comes from the plan; what is extrapolated is called predicted.
"""

from autobatch.advice.accumulation import (
    AccumulationRow,
    accumulation_rows,
    accumulation_summary,
    equivalence_conditions,
    extrapolate_peak,
    other_window,
    samples_per_update,
)
from autobatch.advice.loop import training_loop
from autobatch.advice.normalization import batchnorm
from autobatch.advice.rates import (
    LearningRateRule,
    learning_rate,
    learning_rate_factors,
    learning_rate_rule,
    scale_lr,
)
from autobatch.advice.wording import count, effective_batch, window_text

__all__ = [
    "AccumulationRow",
    "LearningRateRule",
    "accumulation_rows",
    "accumulation_summary",
    "batchnorm",
    "count",
    "effective_batch",
    "equivalence_conditions",
    "extrapolate_peak",
    "learning_rate",
    "learning_rate_factors",
    "learning_rate_rule",
    "other_window",
    "samples_per_update",
    "scale_lr",
    "training_loop",
    "window_text",
]
