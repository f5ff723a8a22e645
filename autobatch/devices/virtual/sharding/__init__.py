"""Rank 0 of several virtual GPUs: PyTorch's own FSDP2 over a fake process group.

Imports devices.virtual; only devices.virtual.gpu imports it, and only for a sharded workload.
"""
