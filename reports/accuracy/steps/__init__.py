"""Training steps of language models that others measured: configurations, predictions, errors."""
