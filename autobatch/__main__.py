"""`python -m autobatch`."""

from autobatch.cli.entry_point import entry

entry()
