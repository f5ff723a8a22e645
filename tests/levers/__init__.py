"""Levers: what they promise, what they change, and what they leave alone."""
