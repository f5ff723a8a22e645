"""A GPU that is not in the machine: fake tensors over a simulated caching allocator.

Imports devices (base, session, copies, preserve), memory and workload; devices.choose, devices.cuda
and tuning import it.
"""
