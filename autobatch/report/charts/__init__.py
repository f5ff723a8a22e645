"""Charts of comparisons and sweeps: records of numbers, then figures; the only user of matplotlib.

Imports records and support; `report.choices` and `report.sweep` import it, for a report's folder.
"""
