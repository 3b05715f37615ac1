"""Whose turn it is, and on which block: pure functions of the turn's number."""

from __future__ import annotations

from typing import Literal

from fedloom.seeds import derive

Order = Literal["ascending", "descending", "random", "shifted"]
"""ascending: from the input to the output; descending: back; random: drawn anew for every pass over the blocks; shifted: ascending, and one
block further in every cycle, so that a client does not train the same block in each."""


def turns(clients: int, blocks: int) -> int:
    """Turns of one cycle: one of every client, and as many more as it takes until every block has had one."""
    return max(clients, blocks)


def block_at(turn: int, a_cycle: int, blocks: int, order: Order, seed: int) -> int:
    """The block 0..``blocks`` − 1 of a turn, in cycles of ``a_cycle`` turns. Within a cycle every ``blocks`` turns in a row see all."""
    cycle, place = divmod(turn, a_cycle)
    lap, at = divmod(place, blocks)
    match order:
        case "ascending":
            return at
        case "descending":
            return blocks - 1 - at
        case "shifted":
            return (at + cycle) % blocks
        case "random":
            return int(derive(seed, "blocks", cycle, lap).permutation(blocks)[at])
