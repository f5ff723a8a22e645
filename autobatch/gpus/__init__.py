"""What is known of GPUs: the catalogue, NVML, what a run may use, how far a prediction may be off.

Imports support; records and everything above may import it.
"""
