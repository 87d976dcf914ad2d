"""Things filed by their size, for packing rules that ask for the nearest size again and again: a million in seconds."""

from collections.abc import Callable

WORD = 512


class SizeBuckets:
    """Things filed by a size from 0 to ``largest``, with the nearest size that is not empty found in a few steps.

    Sizes in use are bits in words of WORD bits; a second row of bits says which words are not zero.
    """

    def __init__(self, largest: int) -> None:
        self._filed: list[list[int]] = [[] for _ in range(largest + 1)]
        self._words = [0] * (largest // WORD + 1)
        self._used = 0

    def put(self, size: int, thing: int) -> None:
        if not self._filed[size]:
            self._words[size // WORD] |= 1 << (size % WORD)
            self._used |= 1 << (size // WORD)
        self._filed[size].append(thing)

    def take(self, size: int, accepts: Callable[[int], bool]) -> int | None:
        """Removes the thing of this size that came last, of those that are accepted; None if there is none."""
        filed = self._filed[size]
        for place in range(len(filed) - 1, -1, -1):
            if accepts(filed[place]):
                thing = filed.pop(place)
                if not filed:
                    self._words[size // WORD] ^= 1 << (size % WORD)
                    if not self._words[size // WORD]:
                        self._used ^= 1 << (size // WORD)
                return thing
        return None

    def at_least(self, size: int) -> int | None:
        """The smallest size in use from ``size`` on."""
        number, bit = divmod(size, WORD)
        if number >= len(self._words):
            return None
        word = self._words[number] >> bit
        if word:
            return size + _lowest(word)
        above = self._used >> (number + 1)
        if not above:
            return None
        number += 1 + _lowest(above)
        return number * WORD + _lowest(self._words[number])

    def at_most(self, size: int) -> int | None:
        """The largest size in use up to ``size``."""
        if size < 0:
            return None
        number, bit = divmod(size, WORD)
        word = self._words[number] & ((2 << bit) - 1)
        if not word:
            below = self._used & ((1 << number) - 1)
            if not below:
                return None
            number = below.bit_length() - 1
            word = self._words[number]
        return number * WORD + word.bit_length() - 1


def _lowest(word: int) -> int:
    return (word & -word).bit_length() - 1
