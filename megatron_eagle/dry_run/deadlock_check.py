"""Do all processes of a job meet? Plays what each of them sends and waits for, and names the first that waits in vain.

A collective ends when every member of its group has come to it with the same operation and sizes that fit; until then
its members do nothing else. A message between pipeline stages is sent without waiting; who wants it waits for it,
unless the schedule asks for messages ahead of time (interleaved stages), when only their order and sizes are compared.
If every process gets to the end of its list, no order of arrival can make them wait for each other: that is a proof
for the lists it is given, which ``walk.py`` takes from the trainer's own code.
"""

from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from megatron_eagle.dry_run.symbolic_rank import Call
from megatron_eagle.errors import UserError
from megatron_eagle.parallel.groups import RankCoordinates


class CollectiveMismatch(UserError):
    """A process waits for others that never come, or that come with something else."""


@dataclass(frozen=True)
class Program:
    """What one process exchanges in a step. exact: walked for this very process, not for another of the same kind."""

    calls: Sequence[Call]
    exact: bool = True


def as_seen_by(calls: Sequence[Call], walked: int, rank: int, places: Sequence[RankCoordinates]) -> list[Call]:
    """What process ``walked`` exchanges, for ``rank``, which differs from it along some axes of ``places`` only.

    An axis along which all members of a group stand where ``walked`` does is one that the group does not run along:
    there, the members stand where ``rank`` does.
    """
    if walked == rank:
        return list(calls)
    by_place = {place: number for number, place in enumerate(places)}
    known: dict[tuple[int, ...], tuple[int, ...]] = {}

    def moved(members: tuple[int, ...]) -> tuple[int, ...]:
        if members not in known:
            old, new = places[walked], places[rank]
            fixed = {
                axis: getattr(new, axis)
                for axis in ("dp", "pp", "cp", "tp")
                if all(getattr(places[member], axis) == getattr(old, axis) for member in members)
            }
            known[members] = tuple(by_place[replace(places[member], **fixed)] for member in members)
        return known[members]

    return [replace(call, members=moved(call.members)) for call in calls]


def meet(programs: Sequence[Program], *, messages_wait: bool) -> int:
    """Play all programs, by rank; returns how many exchanges met. Raises CollectiveMismatch with rank and operation."""
    position, sent = [0] * len(programs), defaultdict[tuple[int, int], deque[Call]](deque)
    arrived: dict[tuple[int, ...], list[int]] = defaultdict(list)
    received: dict[tuple[int, int], deque[Call]] = defaultdict(deque)
    ready = deque(range(len(programs)))
    blocked_on_message: dict[tuple[int, int], int] = {}
    met = 0
    while ready:
        rank = ready.popleft()
        for call in _from(programs[rank].calls, position, rank):
            if call.operation == "send":
                channel = (call.members[0], call.members[1])
                sent[channel].append(call)
                if channel in blocked_on_message:
                    ready.append(blocked_on_message.pop(channel))
            elif call.operation == "recv":
                channel = (call.members[0], call.members[1])
                if messages_wait and not sent[channel]:
                    blocked_on_message[channel] = rank
                    break
                if messages_wait:
                    _same(sent[channel].popleft(), call, *channel)
                    met += 1
                else:
                    received[channel].append(call)
            else:
                here = arrived[call.members]
                here.append(rank)
                if len(here) < len(call.members):
                    break
                met += 1
                _agree(call, here, programs, position)
                ready += [other for other in here if other != rank]
                for other in here:
                    position[other] += other != rank
                arrived[call.members] = []
            position[rank] += 1
    _all_through(programs, position)
    return met + _compare_messages(sent, received)


def _from(calls: Sequence[Call], position: list[int], rank: int) -> Iterator[Call]:
    while position[rank] < len(calls):
        yield calls[position[rank]]


def _agree(call: Call, here: list[int], programs: Sequence[Program], position: list[int]) -> None:
    """All that have arrived ask for the same."""
    own = here[-1]
    for other in here[:-1]:
        theirs = programs[other].calls[position[other]]
        if theirs.operation != call.operation:
            raise CollectiveMismatch(f"rank {other} is in {describe(theirs)}, but rank {own} in {describe(call)}")
        both_exact = programs[other].exact and programs[own].exact
        if call.operation == "alltoall_base_":
            me, you = call.members.index(own), call.members.index(other)
            kind, *(given, taken) = call.sizes[0][0], call.sizes[1], call.sizes[2]
            fits = kind == theirs.sizes[0][0] and (
                not both_exact or (given[you] == theirs.sizes[2][me] and taken[you] == theirs.sizes[1][me])
            )
        else:
            fits = call.sizes == theirs.sizes or (_carries_objects(call) and _carries_objects(theirs))
        if not fits:
            raise CollectiveMismatch(
                f"rank {other} brings {theirs.sizes} to {describe(theirs)}, but rank {own} {call.sizes}"
            )


def _carries_objects(call: Call) -> bool:
    """Python objects travel as bytes whose number each process states first."""
    return all(size[0] == "uint8" for size in call.sizes)


def _same(sent: Call, wanted: Call, sender: int, receiver: int) -> None:
    if sent.sizes != wanted.sizes:
        raise CollectiveMismatch(f"rank {sender} sends {sent.sizes} to rank {receiver}, which waits for {wanted.sizes}")


def _compare_messages(sent: dict[tuple[int, int], deque[Call]], received: dict[tuple[int, int], deque[Call]]) -> int:
    count = 0
    for channel in sent.keys() | received.keys():
        if len(sent[channel]) != len(received[channel]):
            raise CollectiveMismatch(
                f"rank {channel[0]} sends rank {channel[1]} {len(sent[channel])} messages that are not taken on the "
                f"spot, rank {channel[1]} waits for {len(received[channel])}"
            )
        for given, wanted in zip(sent[channel], received[channel], strict=True):
            _same(given, wanted, *channel)
            count += 1
    return count


def _all_through(programs: Sequence[Program], position: list[int]) -> None:
    waiting = [rank for rank, program in enumerate(programs) if position[rank] < len(program.calls)]
    if not waiting:
        return
    first = max(waiting, key=lambda rank: len(programs[rank].calls) - position[rank])
    call = programs[first].calls[position[first]]
    absent = [rank for rank in call.members if rank not in waiting]
    elsewhere = [rank for rank in call.members if rank != first and rank in waiting]
    failure = f"; rank {absent[0]} has ended without it" if absent else ""
    for rank in elsewhere:
        other = programs[rank].calls[position[rank]]
        if not absent and (other.members, other.operation) != (call.members, call.operation):
            failure = f"; rank {rank} is in {describe(other)}"
            break
    raise CollectiveMismatch(
        f"rank {first} waits for ever in {describe(call)}, its exchange {position[first] + 1} of "
        f"{len(programs[first].calls)}{failure} ({len(waiting)} of {len(programs)} processes are stuck)"
    )


def describe(call: Call) -> str:
    """``allreduce_ of float32 x 61440 among 64 processes (0, 4, ...)``."""
    sizes = ", ".join(f"{size[0]} x {size[1]}" for size in call.sizes if len(size) == 2 and isinstance(size[0], str))
    shown = ", ".join(map(str, call.members[:4])) + (", ..." if len(call.members) > 4 else "")
    return f"{call.operation.strip('_')} of {sizes} among {len(call.members)} processes ({shown})"
