"""A GPU that is not in the machine: fake tensors over a simulated caching allocator.

Imports devices (base, session, copies), memory and workload; tuning imports it.
"""
