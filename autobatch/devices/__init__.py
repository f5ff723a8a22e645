"""Where workloads run: what every device is, the GPU in the machine, and the simulated one.

Imports workload, memory, gpus and support; tuning, equivalence and cli import it.
"""
