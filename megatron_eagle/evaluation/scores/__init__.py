"""How an answer is scored: one rule a file, with the source it is equal to (docs/evaluation.md has the comparisons).

A rule takes texts and gives a number or a verdict; it draws nothing at random and asks nobody. What cannot be told from
an answer is None there, and wrong where it is counted. References are never changed.
"""
