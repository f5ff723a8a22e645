"""Rules for what CUDA's kernels return and allocate, one file a kind of kernel.

Imports gpus, support, and from devices.virtual the recorder and elements; only devices.virtual
imports it.
"""
