"""Charts of a plan: each is first a record of numbers, then a figure; the only user of matplotlib.

Imports records and support; `report.folder` imports it, when a report is written.
"""
