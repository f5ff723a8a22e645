"""A plan in the words of each trainer, as plain data.

Imports records; plan and integrations import it.
"""
