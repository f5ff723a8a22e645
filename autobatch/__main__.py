"""`python -m autobatch`."""

from autobatch.cli import entry

entry()
