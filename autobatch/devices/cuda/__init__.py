"""The GPU in the machine: windows that run on it, and its own record of the memory.

Imports devices (the modules beside it, and virtual.gpu for a first guess) and what they import;
only devices.choose imports it.
"""
