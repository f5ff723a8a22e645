"""What can be changed of a training run: each lever, its line of code, and how a copy gets it.

Imports workload, memory and gpus; tuning and what is above import it.
"""
