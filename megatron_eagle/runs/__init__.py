"""Trained runs looked at from outside: which there are, and in what they differ."""
