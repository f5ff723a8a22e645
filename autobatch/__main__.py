"""`python -m autobatch`."""

import sys

try:
    from autobatch.cli.entry_point import entry

    entry()
except KeyboardInterrupt:  # before the command had begun
    sys.exit(130)
