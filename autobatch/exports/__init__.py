"""A plan as the arguments and settings of each trainer: plain data, no training.

Imports records; plan and integrations import it.
"""
