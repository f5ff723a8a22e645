"""Helpers of the tests, and the tests of `autobatch.support`."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
"""The repository."""
