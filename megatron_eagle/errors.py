"""Errors that are the user's to mend: the command line prints them as one clear line, without a traceback.

Everything else (a bug of ours, a broken installation) keeps its traceback, because there the traceback is the help.
"""


class UserError(Exception):
    """Bad input, said in one line that holds the numbers and names needed to mend it."""


class Damaged(UserError):
    """A checkpoint whose files are not what was written. what: the first half of the message, without advice."""

    def __init__(self, message: str, what: str = "", folder: str = "") -> None:
        super().__init__(message)
        self.what, self.folder = what or message, folder


class UnreachableStore(UserError):
    """An object store that does not deliver, after all that was tried: no fault of a sample, so none is rejected."""


class LostContact(Exception):
    """Another process died or hung; says which process noticed, in which step, and in which operation."""


class Superseded(Exception):
    """A newer start of the same run is at work (``training.fencing``): this one writes nothing more and leaves."""


class BrokenSample(ValueError):
    """A sample that cannot be trained on; the message is the reason, in one line, without the sample's name.

    Building a data set lists such samples in ``rejected.jsonl``; training skips and names them. Every other exception
    is a bug of ours or a sick machine and stops the run, so nothing in ``data`` may catch more than this class.
    """
