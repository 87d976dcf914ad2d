"""When a stage is over: the one rule, for the trainer and for what watches it on a cluster. Imports nothing."""


def out_of_patience(waited: int, patience: int | None) -> bool:
    """Whether ``waited`` evaluations in a row without a higher score end a stage (``evaluation.patience``)."""
    return patience is not None and waited >= patience


def is_over(step: int, steps: int, waited: int, patience: int | None) -> bool:
    """Whether a checkpoint after ``step`` of ``steps`` is a stage's last one."""
    return step >= steps or out_of_patience(waited, patience)
