"""Is the gradient of a window of micro-batches that of its whole batch, and if not, why?

Imports tuning and everything below it; the command line imports it.
"""
