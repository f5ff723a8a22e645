"""Tuning from inside a trainer: each library is imported by the module that bears its name.

Imports tuning, plan, devices and exports; only users import it.
"""
