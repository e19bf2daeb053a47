"""How many of the pages that prompts asked for were asked for before: the share that no cache could exceed.

    ceiling = (asked - distinct) / asked

Distinct pages are counted by HyperLogLog (Flajolet et al. 2007), in 16 KiB however many there are, within 1 %: the name
of a page is a hash already. Left out: a window of time, as what was asked long ago counts for ever.
"""

from array import array
from collections.abc import Sequence
from math import log

from engine.messages.tiers import NAME_BYTES

BITS = 14
REGISTERS = 1 << BITS
WIDE = 64 - BITS  # bits of a hash whose leading zeros count


class Ceiling:
    """Of the pages whose names are `asked` for."""

    def __init__(self) -> None:
        self.asked = 0
        self._registers = bytearray(REGISTERS)
        self._ranks = [REGISTERS] + [0] * (WIDE + 1)  # how many registers have each

    def ask(self, names: Sequence[bytes], known: int = 0) -> None:
        """Of the first `known` a cache has given, they were asked for before, by whomever: so they are no new ones."""
        registers, ranks = self._registers, self._ranks
        self.asked += len(names)
        for number in array("Q", b"".join(names[known:]))[:: NAME_BYTES // 8]:
            rank = WIDE + 1 - (number >> BITS).bit_length()
            register = number & (REGISTERS - 1)
            if rank > registers[register]:
                ranks[registers[register]] -= 1
                ranks[rank] += 1
                registers[register] = rank

    @property
    def distinct(self) -> float:
        """How many different ones that were, about."""
        harmonic = sum(count * 2.0**-rank for rank, count in enumerate(self._ranks))
        estimate = 0.7213 / (1 + 1.079 / REGISTERS) * REGISTERS**2 / harmonic
        empty = self._ranks[0]
        if estimate <= 2.5 * REGISTERS and empty:
            return REGISTERS * log(REGISTERS / empty)
        return estimate

    @property
    def ratio(self) -> float:
        """The share of pages asked for that an endless cache would have held."""
        return max(0.0, 1.0 - self.distinct / self.asked) if self.asked else 0.0
