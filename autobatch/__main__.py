"""`python -m autobatch`."""

from autobatch.cli.commands import entry

entry()
