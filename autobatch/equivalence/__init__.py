"""Is the gradient of a window of micro-batches that of its whole batch, and if not, why?

Imports devices, report, workload and what is below; the command line imports it.
"""
