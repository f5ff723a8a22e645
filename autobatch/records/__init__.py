"""Plain, frozen records: a plan's answer and its evidence, and their JSON.

Imports gpus and support; everything from memory upwards may import it.
"""
