"""Plain, frozen records: a plan's answer and its evidence, and their JSON.

Imports gpus; everything from memory upwards may import it.
"""
