"""The typed recipe, what it may say and what follows from it: numbers and checks only, importable without torch."""
