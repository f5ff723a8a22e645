"""Gradient accumulation in the user's own loop: the gradient of the effective batch, exactly.

Imports workload, records and support; plan and everything above may import it.
"""
