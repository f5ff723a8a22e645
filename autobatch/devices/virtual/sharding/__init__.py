"""Rank 0 of several virtual GPUs: PyTorch's own FSDP and tensor parallel plans, in a fake group.

Imports devices.virtual; only devices.virtual.gpu imports it, and only for a sharded workload.
"""
