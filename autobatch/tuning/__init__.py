"""How a plan is found: probing, the search for the ceiling, isolation, agreement between ranks.

Imports plan, devices, workload and what is below; equivalence, integrations and cli import it.
"""
