"""Fixtures shared by all tests: worlds of processes, and one small data set with recipes to train on it."""

from worlds import worlds

from small_run import small_run

__all__ = ["small_run", "worlds"]
