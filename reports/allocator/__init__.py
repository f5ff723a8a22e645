"""Replay of recorded allocator traces: `python -m reports.allocator FOLDER`."""
