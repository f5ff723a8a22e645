"""Memory as numbers: traces, the trace model, the caching allocator, snapshots, footprints.

No torch in here. Imports records, gpus and support; workload, devices and tuning import it.
"""
