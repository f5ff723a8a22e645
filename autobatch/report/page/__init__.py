"""The page of a plan: one HTML file that a browser opens from disk, with scripts of our own.

Imports the rest of report and what is below; `report.folder` imports it.
"""
