"""Where workloads run: what every device is, the GPU in the machine, and the simulated one.

Imports workload, memory, records, gpus and support; cli, equivalence and tuning import it.
"""
