"""A model named by one string, a SPEC, as on the command line: grammar, libraries, user code.

Imports infer and workload beside it, and each library in the module that bears its name; the
command line and reports may import it.
"""
