"""Choosing between runs: the card (`compare`), a size of the data or model (`vary`), and settings.

Imports tuning and what is below; equivalence, integrations and cli may import it.
"""
