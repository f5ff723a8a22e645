"""Charts of comparisons, sweeps and recordings: numbers, then figures; the only user of matplotlib.

Imports records, memory and support; the modules of `report` import it, for a report's folder.
"""
