"""The command line: its verbs, its parser and what a terminal shows.

It may import everything, and only `__main__` imports it.
"""

from autobatch.cli.entry_point import entry, main

__all__ = ["entry", "main"]
