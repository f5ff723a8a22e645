"""An older name of `autobatch.integrations.transformers`."""

from autobatch.exports.transformers import training_arguments
from autobatch.integrations.transformers import AutobatchCallback, tune_trainer

__all__ = ["AutobatchCallback", "training_arguments", "tune_trainer"]
