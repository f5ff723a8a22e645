"""The command line: its verbs, its parser and what a terminal shows.

It may import everything, and nothing imports it.
"""

from autobatch.cli.entry_point import entry, main

__all__ = ["entry", "main"]
