"""Tests of README and docs: every code block runs, every link leads somewhere."""
