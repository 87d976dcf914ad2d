"""Benchmarks: questions from the files people have, asked in Eagle's words, scored by the published rules.

A question that cannot be read is wrong and counted: what a score is a share of is all questions of the file, and those
that could not be asked stand beside it with their reasons.
"""
