"""How a round's cohort S_t is drawn. A cohort is a pure function of (seed, round): resuming needs no replay."""

from __future__ import annotations

from dataclasses import dataclass

from fedloom.seeds import derive


@dataclass(frozen=True)
class Pool:
    """The clients that exist (by id), how many are drawn a round, and the experiment's seed and number of rounds T."""

    clients: tuple[int, ...]
    cohort: int
    rounds: int
    seed: int

    def __post_init__(self) -> None:
        if not 1 <= self.cohort <= len(self.clients):
            raise ValueError(f"a cohort of {self.cohort} cannot be drawn from {len(self.clients)} clients; use 1 to {len(self.clients)}")


def uniform(pool: Pool, round: int) -> tuple[int, ...]:
    """S_t: ``pool.cohort`` distinct clients, uniform without replacement, in ascending order of id."""
    drawn = derive(pool.seed, "cohort", round).choice(len(pool.clients), size=pool.cohort, replace=False)
    return tuple(pool.clients[i] for i in sorted(drawn))
