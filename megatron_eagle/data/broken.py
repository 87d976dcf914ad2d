"""BrokenSample: the one exception that means "this sample is bad", and nothing else.

Building a data set lists such samples in ``rejected.jsonl``; training skips and names them. Every other exception is a
bug of ours or a sick machine and stops the run, so nothing in this room may catch more than this class.
"""


class BrokenSample(ValueError):
    """A sample that cannot be trained on; the message is the reason, in one line, without the sample's name."""
