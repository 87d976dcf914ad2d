"""Errors that are the user's to mend: the command line prints them as one clear line, without a traceback.

Everything else (a bug of ours, a broken installation) keeps its traceback, because there the traceback is the help.
"""


class UserError(Exception):
    """Bad input, said in one line that holds the numbers and names needed to mend it."""


class LostContact(Exception):
    """Another process died or hung; says which process noticed, in which step, and in which operation."""
