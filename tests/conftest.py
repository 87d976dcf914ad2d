"""Fixtures shared by all tests: worlds of processes, and one small data set with recipes to train on it."""

from small_run import small_run
from worlds import worlds

__all__ = ["small_run", "worlds"]
