"""The parts of a GPU day: each a file here with one function ``run(setting) -> PartResult``, found by its name.

The command runs them in alphabetical order. Every part runs in a process of its own, on a CPU at toy
size, and says of what only a GPU can show that it was skipped.
"""
