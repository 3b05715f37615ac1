"""FedCyBGD, FedBAvg and the sequential hand-over as they run on both computes, against NumPy: whole cycles computed from the sentences.

The tensors are those of a four-layer model's adapter, so a block is a layer's; what a block is made of is ``test_blocks_cover.py``'s to
show.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch

from fedloom.client.host import Host
from fedloom.client.store import ClientStore
from fedloom.compute.compute import Compute, Done
from fedloom.compute.work import Fit, WorkItem
from fedloom.encodings import NF4, Encoding
from fedloom.engines.engine import drive
from fedloom.engines.local import Local
from fedloom.engines.wrap import Faulty, Lossy, Recording
from fedloom.messages import CohortFailed
from fedloom.methods.fedbavg import FedBAvg
from fedloom.methods.fedcybgd import FedCyBGD
from fedloom.methods.handover import Handover
from fedloom.methods.method import State
from fedloom.model.proxies import bytes_of
from fedloom.server.cycle import block_at
from fedloom.server.participation import Pool, uniform
from fedloom.tensors import fingerprint, nbytes, only
from tests import tiny
from tests.oracle import real
from tests.oracle.numpy_encoder import pad
from tests.oracle.numpy_training import aggregate, train
from tests.oracle.test_baselines import epochs, kinds

CYCLE = Pool((0, 1, 2, 3), 2, 6, 8)
FEW = Pool((0, 1, 2), 1, 8, 8)
BLOCKS = 4
INNER = replace(real.INNER, schedule="cosine")
RULE = replace(real.RULE, cosine=True)


def of_block(block: int) -> set[str]:
    """A layer's tensors, by the part of the name that says which layer."""
    return {n for n in real.start() if f".layer.{block}." in n}


HEAD = {n for n in real.start() if "classifier" in n}


def turn(client: int, block: int, at: dict[str, np.ndarray], t: int) -> tuple[dict[str, np.ndarray], list[float]]:
    """AdamW from m = v = 0 on the block and the head alone."""
    return train(real.encoder(), at, of_block(block) | HEAD, real.questions(client), epochs(client, "batches", t), RULE)


@kinds
@pytest.mark.parametrize(
    ("order", "pool", "who", "which"),
    [
        ("ascending", CYCLE, [0, 1, 2, 3, 0, 1], [0, 1, 2, 3, 0, 1]),
        ("descending", CYCLE, [0, 1, 2, 3, 0, 1], [3, 2, 1, 0, 3, 2]),
        ("shifted", CYCLE, [0, 1, 2, 3, 0, 1], [0, 1, 2, 3, 1, 2]),
        ("ascending", FEW, [0, 1, 2, 0, 0, 1, 2, 0], [0, 1, 2, 3, 0, 1, 2, 3]),
    ],
)
def test_turn_after_turn(kind: real.Kind, order: Any, pool: Pool, who: list[int], which: list[int]) -> None:
    """Client k trains block b on top of the server's model; the server puts w_b and the head in the place of its own. With fewer clients
    than blocks one takes several turns. Only what changed since the client was last sent it goes down, and one block comes up."""
    follow(real.run(FedCyBGD(INNER, order), kind, pool), pool, who, which)


def follow(made: real.Run, pool: Pool, who: list[int], which: list[int]) -> None:
    """Turn after turn of a run, against a derivation in which ``who`` trains ``which`` block."""
    shared, changed = real.start(), [0] * BLOCKS
    seen = {k: [0] * BLOCKS for k in pool.clients}
    for t, (exchange, client, block) in enumerate(zip(made.asked("train"), who, which, strict=True)):
        assert tuple(exchange.down) == (client,)
        due = {block} | {j for j in range(BLOCKS) if changed[j] > seen[client][j]}
        assert set(exchange.down[client].tensors) == HEAD.union(*map(of_block, due))
        for j in due:
            seen[client][j] = changed[j]
        up = exchange.up[client]
        assert set(up.tensors) == of_block(block) | HEAD
        assert nbytes(up.tensors) == 4 * sum(shared[n].size for n in of_block(block) | HEAD)
        before = made.states[t].shared
        after, losses = turn(client, block, shared, t)
        shared, changed[block] = after, t + 1
        real.assert_close(made.states[t + 1].shared, shared)
        assert up.metrics["loss"] == pytest.approx(np.mean(losses), abs=1e-4)
        untouched = set(shared) - of_block(block) - HEAD
        assert all(torch.equal(before[n], made.states[t + 1].shared[n]) for n in untouched)
        assert all(torch.equal(up.tensors[n], made.states[t + 1].shared[n]) for n in up.tensors), "replaced, not averaged"
        assert all(not torch.equal(before[n], up.tensors[n]) for n in up.tensors)
    for logits in made.logits.values():
        assert set(logits) == {"validation", "test"}
    assert made.assembled is not None
    real.assert_close(made.assembled, shared)


SIX = Pool((0, 1, 2, 3, 4, 5), 1, 12, 8)
"""More devices than blocks, as in the paper, and two cycles of theirs."""


@pytest.fixture
def six(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two devices more than other oracles have; the first four are these."""
    sizes = (*real.SIZES, 7, 11)
    there = tiny.clients(sizes, real.SEED)
    monkeypatch.setattr(real, "devices", lambda: there)
    monkeypatch.setattr(real, "SIZES", sizes)


@pytest.mark.parametrize(
    ("order", "which"),
    [
        ("ascending", [0, 1, 2, 3, 0, 1] * 2),
        ("descending", [3, 2, 1, 0, 3, 2] * 2),
        ("shifted", [0, 1, 2, 3, 0, 1, 1, 2, 3, 0, 1, 2]),
        ("random", None),
    ],
)
@pytest.mark.usefixtures("six")
def test_two_cycles_of_more_devices_than_blocks(order: Any, which: list[int] | None) -> None:
    """A cycle is one turn of each of the six, in order, and device k's block is k mod 4: four blocks, and two of them once more. The same
    in both cycles; counted from the output; one further in the second; or in an order that is drawn for every pass over the four."""
    made = real.run(FedCyBGD(INNER, order), "serial", SIX)
    assert made.states[0].facts["turns_per_cycle"] == 6
    blocks = [next(b for b in range(BLOCKS) if of_block(b) <= set(e.up[t % 6].tensors)) for t, e in enumerate(made.asked("train"))]
    cycles = [blocks[:6], blocks[6:]]
    assert all(sorted(cycle[:4]) == [0, 1, 2, 3] and len(set(cycle[4:])) == 2 for cycle in cycles)
    assert which is None or blocks == which
    follow(made, SIX, [0, 1, 2, 3, 4, 5] * 2, blocks)
    assert all(len(e.down[t % 6].tensors) > len(HEAD) + 2 * len(of_block(0)) for t, e in enumerate(made.asked("train")) if t > 3)


def test_every_pass_over_the_blocks_has_an_order_of_its_own() -> None:
    """With six turns a cycle the fifth and the sixth begin another pass: over many cycles their blocks are the first two's again as often
    as of orders that have nothing to do with each other, one in twelve."""
    drawn = [[block_at(turn, 6, BLOCKS, "random", 8) for turn in range(6 * cycle, 6 * cycle + 6)] for cycle in range(240)]
    assert all(sorted(cycle[:4]) == [0, 1, 2, 3] and cycle[4] != cycle[5] for cycle in drawn)
    assert 8 <= sum(cycle[4:] == cycle[:2] for cycle in drawn) <= 34
    assert min(min(Counter(cycle[place] for cycle in drawn).values()) for place in range(6)) > 30


def test_a_random_order_sees_every_block_in_every_cycle_and_is_drawn_anew() -> None:
    pool = Pool((0, 1, 2, 3), 1, 12, 8)
    made = real.run(FedCyBGD(replace(INNER, local_epochs=1), "random"), "stacked", pool)
    blocks = [next(b for b in range(BLOCKS) if of_block(b) <= set(e.up[t % 4].tensors)) for t, e in enumerate(made.asked("train"))]
    cycles = [blocks[i : i + 4] for i in range(0, 12, 4)]
    assert all(sorted(cycle) == [0, 1, 2, 3] for cycle in cycles)
    assert len({tuple(cycle) for cycle in cycles}) > 1


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_with_a_subset_a_client_trains_on_top_of_what_it_has(share: float) -> None:
    """A random share of the other changed blocks goes down; the rest stay as the client was sent them last, or pre-trained. The block in
    question and the head are always exact."""
    made = real.run(FedCyBGD(INNER, subset=share), "serial", FEW)
    shared, changed = real.start(), [0] * BLOCKS
    has = {k: real.start() for k in FEW.clients}
    seen = {k: [0] * BLOCKS for k in FEW.clients}
    stale = 0
    for t, exchange in enumerate(made.asked("train")):
        ((client, task),) = exchange.down.items()
        block = t % BLOCKS
        due = [j for j in range(BLOCKS) if j != block and changed[j] > seen[client][j]]
        sent = {j for j in range(BLOCKS) if of_block(j) <= set(task.tensors)}
        assert block in sent and sent - {block} <= set(due) and len(sent) - 1 == round(share * len(due))
        for n in of_block(block) | HEAD:
            assert torch.equal(task.tensors[n], made.states[t].shared[n]), "the block in question and the head come exact"
        has[client] |= {n: shared[n] for n in HEAD.union(*map(of_block, sent))}
        for j in sent:
            seen[client][j] = changed[j]
        stale += any(not np.array_equal(has[client][n], shared[n]) for n in shared)
        after, _ = turn(client, block, has[client], t)
        shared, changed[block] = shared | {n: after[n] for n in of_block(block) | HEAD}, t + 1
        real.assert_close(made.states[t + 1].shared, shared)
    assert stale > 2


def test_which_blocks_go_down_is_drawn_for_every_turn_and_follows_from_the_seed() -> None:
    """Of seven blocks that are due round(.4·7) = 3, each as likely, for every client and every turn anew."""
    method = FedCyBGD(subset=0.4, parts="halves")
    begin = method.init(tiny.model(kind="full", layers=BLOCKS))
    blocks = method.blocks(begin.shared)
    assert len(blocks) == 2 * BLOCKS
    due = {"changed": torch.ones(8, dtype=torch.int64), "seen": torch.zeros(3, 8, dtype=torch.int64)}

    def drawn(seed: int, turn: int, place: int) -> tuple[int, ...]:
        task, seen = method.turn(replace(begin, round=turn, server=due), replace(FEW, seed=seed), place, 0)
        sent = tuple(j for j in range(8) if set(blocks[j].names) <= set(task.tensors))
        assert sent == tuple(torch.nonzero(seen).flatten().tolist()) and len(sent) == 4 and sent[0] == 0
        return sent[1:]

    found = {(turn, place): drawn(8, turn, place) for turn in range(60) for place in range(3)}
    assert len({found[0, place] for place in range(3)}) > 1, "of one turn's number, on other clients"
    assert all(len({found[turn, place] for turn in range(60)}) > 10 for place in range(3)), "of one client, in other turns"
    assert [drawn(8, turn, 1) for turn in range(6)] == [found[turn, 1] for turn in range(6)]
    assert [drawn(9, turn, 1) for turn in range(6)] != [found[turn, 1] for turn in range(6)]
    often, share = Counter(j for some in found.values() for j in some), 3 / 7
    assert all(abs(often[j] - 180 * share) < 4 * np.sqrt(180 * share * (1 - share)) for j in range(1, 8))


def test_a_client_that_dies_costs_its_turn_and_nothing_else() -> None:
    """Client 1 never answers. The others' turns are what they would be had it none."""
    method, pool, store = FedCyBGD(INNER), Pool((0, 1, 2, 3), 4, 6, 8), ClientStore()
    host = Host(method, lambda k: replace(real.devices()[k], private={}, memory={}), real.compute("serial"), store, real.DIGEST)
    engine = Faulty(Local(host), fails=lambda task, _: "out of range" if task.client == 1 else None)
    state = drive(method.setup(method.init(real.model()), pool), engine, quorum=0)
    shared = real.start()
    for t in range(pool.rounds):
        state = drive(method.round(state, pool), engine, quorum=1.0)
        if t % 4 != 1:
            shared = turn(t % 4, t % 4, shared, t)[0]
        real.assert_close(state.shared, shared)
    assert state.round == 6


@dataclass
class Failing:
    """A compute that raises in the training of the device and of the time that it is told, counted from 0 for each device."""

    client: int
    time: int
    inner: Compute
    asked: Counter[int] = field(default_factory=Counter)

    def run(self, items: Sequence[WorkItem]) -> list[Done]:
        """As inner, or not at all."""
        here = Counter(real.owner(item.examples) for item in items if isinstance(item, Fit))
        self.asked += here
        if here[self.client] and self.asked[self.client] == self.time + 1:
            raise MemoryError("the device ran out of memory")
        return self.inner.run(items)


Held = dict[int, dict[str, torch.Tensor]]


def disturbed(method: Any, pool: Pool, client: int, time: int, reached: bool) -> tuple[list[State], Recording, list[Held]]:
    """Set-up, and round after round, each asking overheard, and what devices hold before and after; ``client`` fails when it trains for the
    ``time``-th time (from 0). ``reached``: it kept what it was sent, and only its answer was lost. Otherwise its training raised."""
    store, serial = ClientStore(), real.compute("serial")
    compute = serial if reached else Failing(client, time, serial)
    engine: Any = Local(Host(method, lambda k: replace(real.devices()[k], private={}, memory={}), compute, store, real.DIGEST), wave=1)
    if reached:
        engine = Lossy(engine, lambda task, attempt: "reset by peer" if (task.client, attempt) == (client, time) else None)
    recording = Recording(engine)
    states, kept = [drive(method.setup(method.init(real.model()), pool), recording, quorum=0)], list[Held]()
    for _ in range(pool.rounds):
        kept.append({k: store.load(k)[0] for k in pool.clients})
        states.append(drive(method.round(states[-1], pool), recording, quorum=0.5))
    return states, recording, [*kept, {k: store.load(k)[0] for k in pool.clients}]


@pytest.mark.parametrize("reached", [False, True], ids=["training raises", "answer lost"])
@pytest.mark.parametrize(
    ("method", "pool", "client", "time"),
    [
        (FedCyBGD(INNER), Pool((0, 1), 1, 8, 8), 1, 0),
        (FedCyBGD(INNER), Pool((0, 1), 1, 8, 8), 0, 1),
        (FedBAvg(FedCyBGD(INNER)), Pool((0, 1, 2), 2, 6, 8), 1, 1),
    ],
    ids=["fedcybgd, first turn", "fedcybgd, second turn", "fedbavg"],
)
def test_who_failed_once_and_comes_back_is_sent_all_that_it_has_not(method: Any, pool: Pool, client: int, time: int, reached: bool) -> None:
    """Books of who was sent which version of which block. Whose answer did not come may hold what it was sent or not, and is sent it
    again; every turn is trained on top of the server's model as it is then, and that is what the device holds afterwards."""
    states, recording, kept = disturbed(method, pool, client, time, reached)
    shared, changed = real.start(), [0] * BLOCKS
    seen, held = ({k: [0] * BLOCKS for k in pool.clients} for _ in range(2))
    asked, failed, again = Counter[int](), 0, 0
    assert len(recording.calls) == pool.rounds
    for t, (tasks, replies) in enumerate(recording.calls):
        block, fitted = t % BLOCKS, dict[int, dict[str, np.ndarray]]()
        for task in tasks:
            k, now = task.client, {n: states[t].shared[n] for j in range(BLOCKS) if changed[j] for n in of_block(j)}
            gone = (k, asked[k]) == (client, time)
            sent = {block} | {j for j in range(BLOCKS) if changed[j] > seen[k][j]}
            assert set(task.tensors) == HEAD.union(*map(of_block, sent))
            assert all(torch.equal(tensor, states[t].shared[n]) for n, tensor in task.tensors.items())
            again += sum(held[k][j] == changed[j] > seen[k][j] for j in sent)
            if gone and not reached:
                assert fingerprint(kept[t + 1][k]) == fingerprint(kept[t][k])
            else:
                assert all(torch.equal(kept[t + 1][k][n], tensor) for n, tensor in now.items()), "nobody trains on top of an old block"
                held[k] = list(changed)
            if not gone:
                seen[k] = list(changed)
                fitted[k] = turn(k, block, shared, t)[0]
            asked[k], failed = asked[k] + 1, failed + gone
        assert [update.client for update in replies.updates] == list(fitted)
        if fitted:
            shared, changed[block] = aggregate(list(fitted.values()), [real.SIZES[k] for k in fitted]), t + 1
        real.assert_close(states[t + 1].shared, shared)
        assert states[t + 1].server["seen"].tolist() == [seen[k] for k in pool.clients]
    assert failed == 1 and asked[client] > time + 1 and (again > 0) == reached


def test_a_round_of_fedbavg_that_nobody_answers_has_not_been() -> None:
    """It is refused by name; the state is as it was, to the bit, and the same round again is what it would have been, though the devices
    keep what they were sent."""
    method, pool, made = FedBAvg(FedCyBGD(INNER)), Pool((0, 1, 2), 2, 3, 8), []
    for lost in (False, True):
        host = Host(method, lambda k: replace(real.devices()[k], private={}, memory={}), real.compute("serial"), ClientStore(), real.DIGEST)
        engine = Lossy(Local(host), lambda task, _, lost=lost: "silence" if lost and task.settings["round"] == 1 else None)
        state = drive(method.round(drive(method.setup(method.init(real.model()), pool), engine), pool), engine)
        if lost:
            before = fingerprint({**state.shared, **state.server})
            with pytest.raises(CohortFailed, match=r"0 of 2 clients answered, 1 are needed. client \d: silence; client \d: silence"):
                drive(method.round(state, pool), engine, quorum=0.5)
            assert fingerprint({**state.shared, **state.server}) == before
        state = drive(method.round(state, pool), Local(host))
        made.append(fingerprint({**state.shared, **state.server}))
    assert made[0] == made[1]


@kinds
def test_fedbavg(kind: real.Kind) -> None:
    """Every device of S_t trains the same block; the server takes the mean by numbers of examples."""
    made = real.run(FedBAvg(FedCyBGD(INNER)), kind, CYCLE)
    shared = real.start()
    for t, exchange in enumerate(made.asked("train")):
        cohort = uniform(CYCLE, t)
        assert tuple(exchange.down) == cohort
        fitted = [turn(k, t % BLOCKS, shared, t)[0] for k in cohort]
        shared = aggregate(fitted, [real.SIZES[k] for k in cohort])
        assert all(set(exchange.up[k].tensors) == of_block(t % BLOCKS) | HEAD for k in cohort)
        real.assert_close(made.states[t + 1].shared, shared)


@kinds
def test_handover(kind: real.Kind) -> None:
    """One client at a time trains everything and hands it on."""
    made = real.run(Handover(INNER), kind, CYCLE)
    shared = real.start()
    for t in range(CYCLE.rounds):
        client = t % 4
        shared, _ = train(real.encoder(), shared, list(shared), real.questions(client), epochs(client, "batches", t), RULE)
        real.assert_close(made.states[t + 1].shared, shared)


def test_a_share_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="subset is 1.5"):
        FedCyBGD(subset=1.5)


def shrunk(w: np.ndarray, share: float) -> np.ndarray:
    """Magnitude pruning: the ``share`` of a matrix's numbers that is smallest in size is 0, of equals those that come first."""
    if w.ndim < 2:
        return w
    flat = w.ravel().copy()
    flat[np.lexsort((np.arange(flat.size), np.abs(flat)))[: round(share * flat.size)]] = 0.0
    return flat.reshape(w.shape)


def coarse(vector: np.ndarray, bits: int) -> np.ndarray:
    """To 8 bits: round(127·x/c), c the largest size within each 256. To 4: the nearest of NF4's sixteen to x/c, within 64."""
    made = vector.astype(np.float64)
    for at in range(0, len(vector), 256 if bits == 8 else 64):
        part = made[at : at + (256 if bits == 8 else 64)]
        c = np.abs(part).max()
        if not c:
            continue
        levels = np.array(NF4)
        unit = np.round(127 * part / c) / 127 if bits == 8 else levels[np.abs(part[:, None] / c - levels).argmin(1)]
        part[:] = c * unit
    return made


def squeezed(rest: dict[str, np.ndarray], share: float, bits: int) -> dict[str, np.ndarray]:
    """C(w_j): pruned; then what is left of all of them, in order of names, one vector in fewer bits."""
    made = {n: shrunk(w, share) for n, w in sorted(rest.items())}
    if not bits:
        return made
    travels = {n: np.ones(w.shape, bool) if w.ndim < 2 or not share else not_pruned(rest[n], share) for n, w in made.items()}
    vector = coarse(np.concatenate([np.zeros(0), *(made[n][travels[n]] for n in made)]), bits)
    for n, where in travels.items():
        made[n] = np.zeros_like(made[n])
        made[n][where], vector = vector[: where.sum()], vector[where.sum() :]
    return made


def not_pruned(w: np.ndarray, share: float) -> np.ndarray:
    """Where a matrix keeps its numbers, by their rank in size."""
    ranks = np.lexsort((np.arange(w.size), np.abs(w.ravel()))).argsort()
    return (ranks >= round(share * w.size)).reshape(w.shape)


SEVEN = replace(FEW, rounds=7)


@pytest.mark.parametrize(
    ("kind", "drop", "prune", "rest", "bits"),
    [
        ("serial", 0.5, 0.0, "exact", 0),
        ("stacked", 0.0, 0.0, "nf4", 4),
        ("serial", 0.34, 0.4, "int8", 8),
        ("stacked", 0.34, 0.4, "int8", 8),
    ],
)
def test_a_turn_on_top_of_a_smaller_rest(kind: real.Kind, drop: float, prune: float, rest: Any, bits: int) -> None:
    """The device trains its exact block under a model whose other layers are left out, or pruned and in fewer bits: a dense computation
    with the same rest comes to the same. The server's model never becomes the smaller one; what travels is what was predicted."""
    made = real.run(FedCyBGD(INNER, drop=drop, prune=prune, rest=rest), kind, SEVEN)
    shared, changed = real.start(), [0] * BLOCKS
    has, seen = {k: real.start() for k in SEVEN.clients}, {k: [0] * BLOCKS for k in SEVEN.clients}
    left_out, other = [], 0
    for t, exchange in enumerate(made.asked("train")):
        ((client, task),) = exchange.down.items()
        block = t % BLOCKS
        skips = set(task.settings.get("skips", ()))  # type: ignore[arg-type]
        assert len(skips) == round(drop * (BLOCKS - 1)) and block not in skips and skips <= set(range(BLOCKS))
        left_out.append(tuple(sorted(skips)))
        due = [j for j in range(BLOCKS) if j != block and changed[j] > seen[client][j] and j not in skips]
        names = sorted(set().union(*map(of_block, due)))
        now = real.arrays(made.states[t].shared)  # close to what is derived, and to the same side of a step of the grid
        has[client] |= squeezed({n: now[n] for n in names}, prune, bits) | {n: shared[n] for n in of_block(block) | HEAD}
        for n in of_block(block) | HEAD:
            assert torch.equal(task.tensors[n], made.states[t].shared[n]), "the block in question and the head come exact"
        # by hand: 4 bytes a number that is left, a bit for each of a pruned matrix; in 8 or 4 bits, and 4 bytes for every 256 or 64
        matrices = [shared[n].size for n in names if prune and shared[n].ndim > 1]
        numbers = sum(shared[n].size for n in names) - sum(round(prune * size) for size in matrices)
        scales = -(-numbers // (256 if bits == 8 else 64))
        dear = {0: 4 * numbers, 8: numbers + 4 * scales, 4: -(-numbers // 2) + 4 * scales}[bits]
        rest_bytes = dear + sum(-(-size // 8) for size in matrices)
        exact = 4 * sum(shared[n].size for n in of_block(block) | HEAD)
        assert nbytes(task.tensors) == exact + rest_bytes
        assert bytes_of(only(made.states[t].shared, names), prune, Encoding(rest)) == rest_bytes
        for j in [block, *due]:
            seen[client][j] = changed[j]
        there = {n: w for n, w in has[client].items() if not any(n in of_block(j) for j in skips)}
        other += any(not np.array_equal(there[n], shared[n]) for n in there) or bool(skips)
        device = replace(real.encoder(), skipped=frozenset(skips))
        after, losses = train(device, there, of_block(block) | HEAD, real.questions(client), epochs(client, "batches", t), RULE)
        assert exchange.up[client].metrics["loss"] == pytest.approx(np.mean(losses), abs=1e-4)
        shared, changed[block] = shared | {n: after[n] for n in of_block(block) | HEAD}, t + 1
        real.assert_close(made.states[t + 1].shared, shared)
    assert other >= 4
    assert made.assembled is not None
    real.assert_close(made.assembled, shared)
    for client, logits in made.logits.items():
        asked = pad(real.as_oracle(real.devices()[client].test))
        told = real.encoder().forward(shared, asked).logits
        assert np.abs(logits["test"].numpy() - told).max() < 2e-2, "it is the server's model that is evaluated, whole"
    if drop:
        assert len(set(left_out)) > 2, "drawn anew for every turn"


def test_which_layers_are_left_out_follows_from_the_seed() -> None:
    method, blocks = FedCyBGD(drop=0.5), FedCyBGD().blocks(real.model().initial)

    def drawn(seed: int) -> list[frozenset[int]]:
        return [method.skips(blocks, t % BLOCKS, t, replace(FEW, seed=seed), k) for t in range(12) for k in FEW.clients]

    assert drawn(8) == drawn(8) != drawn(9)
    often = Counter(layer for skips in drawn(8) for layer in skips)
    assert set(often) == set(range(BLOCKS)) and max(often.values()) < 3 * min(often.values()), "each as often as another, about"
    halves = FedCyBGD(drop=1.0, parts="halves").blocks(tiny.model(kind="full").initial)
    assert method.skips(halves, 1, 0, FEW, 0) <= {1, 2} and FedCyBGD(drop=1.0).skips(halves, 1, 0, FEW, 0) == {1, 2}


def test_shares_that_are_none_are_refused() -> None:
    for wrong, match in (({"drop": 1.1}, "drop is 1.1"), ({"drop": -0.1}, "drop is -0.1"), ({"prune": 1.0}, "prune is 1.0")):
        with pytest.raises(ValueError, match=match):
            FedCyBGD(**wrong)  # type: ignore[arg-type]
