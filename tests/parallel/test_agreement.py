"""One process acts for all, in real worlds: its result and its failure reach every process, and nobody waits."""

import errno

import pytest

from megatron_eagle.errors import Superseded, UserError


def act(kind: str) -> str:
    """Runs in every process of a world; what it got, or the error that it raised."""
    import torch.distributed as dist

    from megatron_eagle.parallel.agreement import on_rank_zero

    def action() -> int:
        assert dist.get_rank() == 0, "the others only wait"
        if kind == "user":
            raise UserError("no such thing")
        if kind == "disk":
            raise OSError(errno.ENOSPC, "No space left on device")
        if kind == "superseded":
            raise Superseded("start 1 by start 2")
        return 7

    try:
        return str(on_rank_zero(action))
    except (UserError, Superseded, OSError) as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("fine", "7"),
        ("user", "UserError: no such thing"),
        ("disk", "OSError: [Errno 28] No space left on device"),
        ("superseded", "Superseded: start 1 by start 2"),
    ],
)
def test_what_the_first_process_does_is_everybodys(worlds, kind: str, said: str) -> None:
    assert worlds(3).run(act, kind) == [said] * 3


def refuse(failing: tuple[int, ...]) -> str:
    import torch.distributed as dist

    from megatron_eagle.parallel.agreement import refuse_together

    rank = dist.get_rank()
    try:
        refuse_together(f"rank {rank} cannot" if rank in failing else None)
    except UserError as error:
        return str(error)
    return "goes on"


@pytest.mark.parametrize(("failing", "said"), [((), "goes on"), ((2,), "rank 2 cannot"), ((1, 2), "rank 1 cannot")])
def test_what_fails_on_one_process_is_refused_by_all(worlds, failing: tuple[int, ...], said: str) -> None:
    assert worlds(3).run(refuse, failing) == [said] * 3
