"""The GPU in the machine: windows that run on it, and its own record of the memory.

Imports devices (base, session, copies), memory and workload; tuning imports it.
"""
