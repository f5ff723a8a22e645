"""What a plan means for training: pure functions from a plan to facts, sentences and code.

Invariant: every figure comes from the plan; what is extrapolated is called predicted.
"""

from autobatch.advice.accumulation import (
    AccumulationRow,
    accumulation_rows,
    accumulation_summary,
    equivalence_conditions,
    extrapolate_peak,
    other_evidence,
    other_window,
    samples_per_update,
)
from autobatch.advice.loop import training_loop
from autobatch.advice.normalization import BatchNormRow, batchnorm, batchnorm_rows
from autobatch.advice.rates import (
    LearningRateRule,
    learning_rate,
    learning_rate_factors,
    learning_rate_rule,
    scaled_rate,
    warm_up,
)
from autobatch.advice.wording import count, effective_batch, window_text

__all__ = [
    "AccumulationRow",
    "BatchNormRow",
    "LearningRateRule",
    "accumulation_rows",
    "accumulation_summary",
    "batchnorm",
    "batchnorm_rows",
    "count",
    "effective_batch",
    "equivalence_conditions",
    "extrapolate_peak",
    "learning_rate",
    "learning_rate_factors",
    "learning_rate_rule",
    "other_evidence",
    "other_window",
    "samples_per_update",
    "scaled_rate",
    "training_loop",
    "warm_up",
    "window_text",
]
