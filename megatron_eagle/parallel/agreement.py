"""What one process does for all, and what fails on one of them, is everybody's: so that nobody waits for ever.

Every process of the run calls these at the same place. An error of another kind than those named is a bug: it ends the
process that has it, with its traceback.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_eagle.errors import LostContact, Superseded, UserError

Found = TypeVar("Found")


def on_rank_zero(action: Callable[[], Found]) -> Found:
    """What ``action`` returns on rank 0, on every process; the others wait for it.

    Raises, on every process, what it raised there, if that is a UserError, Superseded or an OSError.
    """
    answer: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            answer[0] = action()
        except (UserError, Superseded, OSError) as error:
            answer[1] = error
    dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise answer[1]
    found: Found = answer[0]
    return found


def refuse_together(message: str | None) -> None:
    """Raise a UserError on every process if any has a message: that of the lowest rank. None: this one has nothing."""
    messages: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(messages, message)
    for said in messages:
        if said:
            raise UserError(said)


@contextmanager
def naming_a_loss(where: str) -> Iterator[None]:
    """Raise LostContact, and say ``where`` this process was, if another one is lost in the middle of a collective."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        failure = (
            f"process {dist.get_rank()} of {dist.get_world_size()} lost contact with another one {where}: "
            f"{str(error).splitlines()[0][:200]}"
        )
        # Said here, not by whoever catches it: leaving the broken run can take longer than this process has.
        print(f"megatron-eagle: {failure}", file=sys.stderr, flush=True)
        raise LostContact(failure) from error
