"""Rules for what CUDA's kernels return and allocate, one file a kind of kernel.

Imports support and gpus; only devices.virtual imports it.
"""
