"""Which device holds which rows: IID, Dirichlet label skew, one device a source, or a saved file.

Every row of every split goes to exactly one client. The training rows are dealt first; validation and test rows follow each
client's training labels, so a device is tested on what it is like. Where devices are sources, a row goes to the device of its source.

Label skew has the shape of FibecFed's preset (https://arxiv.org/abs/2410.00131): device sizes (n_1..n_K)/n ~ Dirichlet(beta),
label priors per device pi_k ~ Dirichlet. As in Hsu et al. 2019 (https://arxiv.org/abs/1909.06335) the priors are centred on the
classes' own shares p_c, here with C classes:

    pi_k ~ Dirichlet(alpha * C * p_1, ..., alpha * C * p_C)

Deviation: FibecFed's Dirichlet(alpha, ..., alpha) is the special case of equally frequent classes. With unequal ones it asks
for more rows of a rare class than there are, and what is left over, not alpha, then shapes the devices. Here E[pi_k] = p, so
alpha -> inf is IID and alpha -> 0 is one label a device.

Knows nothing of texts, models or where rows came from: labels in, row numbers out.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedloom.data.dealing import apportion, deal, draw_sizes, group, log_gamma, pack
from fedloom.data.tasks import HELD_OUT, SPLITS, DataError, Split
from fedloom.seeds import derive

Shards = tuple[np.ndarray, ...]
"""Per client k, its sorted int64 row numbers into one split."""

Labels = Mapping[Split, np.ndarray]
"""Per split, the label id of every row."""

Scheme = dict[str, str | int | float]


@dataclass(frozen=True)
class Partition:
    """Row numbers of each client in each split, and how they were made."""

    train: Shards
    validation: Shards
    test: Shards
    scheme: Scheme

    def shards(self, split: Split) -> Shards:
        """All clients' rows of one split."""
        return {"train": self.train, "validation": self.validation, "test": self.test}[split]

    def counts(self, labels: np.ndarray, classes: int) -> np.ndarray:
        """int64 (K, C): how many training rows of each label each client holds; ``labels`` are those of the training split."""
        return _label_counts(self.train, labels, classes)

    def save(self, path: Path) -> None:
        """Write the partition as JSON; a reader sees the old file or the whole new one."""
        clients = [{split: self.shards(split)[k].tolist() for split in SPLITS} for k in range(len(self.train))]
        sizes = {split: sum(map(len, self.shards(split))) for split in SPLITS}
        text = json.dumps({"format": "fedloom-partition-1", "scheme": self.scheme, "sizes": sizes, "clients": clients})
        partial = path.with_name(path.name + ".partial")
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)

    @staticmethod
    def load(path: Path) -> Partition:
        """Read what :meth:`save` wrote.

        Raises:
            DataError: no such file, not a partition, or its rows are not a disjoint cover of its splits.
        """
        try:
            saved = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise DataError(f"cannot read the partition file '{path}': {error.strerror}") from error
        except ValueError as error:
            raise DataError(f"'{path}' is not a partition file: {error}; make one with 'fedloom partition'") from error
        if not isinstance(saved, dict) or saved.get("format") != "fedloom-partition-1":
            raise DataError(f"'{path}' is JSON but not a partition file; make one with 'fedloom partition'")
        try:
            shards = {split: tuple(_rows(client[split]) for client in saved["clients"]) for split in SPLITS}
            scheme, sizes = dict(saved["scheme"]), {split: int(saved["sizes"][split]) for split in SPLITS}
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"the partition file '{path}' is damaged ({error!r}); make it again") from error
        for split in SPLITS:
            _insist_cover(shards[split], sizes[split], f"the partition file '{path}', {split} split")
        return Partition(shards["train"], shards["validation"], shards["test"], scheme)


def partition(
    how: str,
    labels: Labels,
    *,
    clients: int,
    alpha: float,
    beta: float,
    seed: int,
    minimum: int,
    source_column: Mapping[Split, Sequence[Any]] | None = None,
) -> Partition:
    """The partition that ``how`` names: "iid", "label", "column:NAME" or the path of a saved file, which must fit the data.

    ``source_column`` holds the rows' values of the column NAME, of each split that has it. ``minimum`` is the fewest training rows of a
    client.

    Raises:
        DataError: an unknown ``how``, a number out of range, too few rows, or a file that does not fit.
    """
    if how == "iid":
        return iid(labels, clients=clients, seed=seed, minimum=minimum)
    if how == "label":
        return label_skew(labels, clients=clients, alpha=alpha, beta=beta, seed=seed, minimum=minimum)
    if how.startswith("column:"):
        if source_column is None or "train" not in source_column:
            raise DataError(f"partition '{how}' needs the values of column '{how.removeprefix('column:')}', and none came")
        return by_column(labels, source_column, name=how.removeprefix("column:"), clients=clients, seed=seed, minimum=minimum)
    if not how.endswith(".json") and not Path(how).exists():
        raise DataError(f"no partition '{how}'; there are 'iid', 'label', 'column:NAME', or the path of a saved partition file")
    loaded = Partition.load(Path(how))
    _insist_fits(loaded, labels, how, clients, minimum)
    return loaded


def iid(labels: Labels, *, clients: int, seed: int, minimum: int) -> Partition:
    """Training rows dealt at random in equal parts (sizes differ by at most one)."""
    _insist_enough(len(labels["train"]), clients, minimum)
    order = derive(seed, "partition", "iid").permutation(len(labels["train"]))
    owner = np.empty(len(order), np.int64)
    owner[order] = np.arange(len(order)) % clients
    return _with_held_out(group(owner, clients), labels, {"how": "iid", "clients": clients, "seed": seed, "minimum": minimum})


def label_skew(labels: Labels, *, clients: int, alpha: float, beta: float, seed: int, minimum: int) -> Partition:
    """Sizes ~ Dirichlet(beta), label priors per device ~ Dirichlet(alpha C p); see the module. O(n + K C), no rejection.

    Clients are served in a seeded order. Each draws its labels from pi_kc * left_c / had_c, normalised: its prior over the
    classes that have rows left, leaning to those drawn too little so far, so that whoever is served last is not dealt odd
    remains. Labels drawn beyond what a class still holds are drawn again without that class; that closes a class each time.
    """
    for name, value in (("alpha", alpha), ("beta", beta)):
        if not (math.isfinite(value) and value > 0):
            raise DataError(f"{name} of the label skew must be a positive number, not {value}; 0.1 is hard, 100 nearly even")
    train = labels["train"]
    _insist_enough(len(train), clients, minimum)
    sizes = draw_sizes(len(train), clients, beta, minimum, seed)
    had = np.bincount(train)
    left, concentration = had.copy(), alpha * len(had) * had / len(train)
    rng = derive(seed, "partition", "labels")
    counts = np.zeros((clients, len(had)), np.int64)
    for k in rng.permutation(clients):
        log_prior = log_gamma(rng, concentration)
        while (want := int(sizes[k] - counts[k].sum())) > 0:
            open_ = np.flatnonzero(left)
            log_weight = log_prior[open_] + np.log(left[open_] / had[open_])
            weights = np.exp(log_weight - log_weight.max())
            drawn = np.minimum(rng.multinomial(want, weights / weights.sum()), left[open_])
            counts[k, open_] += drawn
            left[open_] -= drawn
    scheme: Scheme = {"how": "label", "clients": clients, "alpha": alpha, "beta": beta, "seed": seed, "minimum": minimum}
    return _with_held_out(group(deal(train, counts, seed, "train"), clients), labels, scheme)


def by_column(labels: Labels, columns: Mapping[Split, Sequence[Any]], *, name: str, clients: int, seed: int, minimum: int) -> Partition:
    """One client per distinct value of a training column; more values than clients are packed whole, evenly by rows.

    A held-out row goes to the client that has its value, or by its label where none has it or its split has no such column.
    """
    values = columns["train"]
    rows = len(labels["train"])
    for split, of in columns.items():
        if len(of) != len(labels[split]):
            kind = "training" if split == "train" else split
            raise DataError(f"column '{name}' came with {len(of)} values for {len(labels[split])} {kind} rows; there must be one a row")
    if None in values:
        raise DataError(f"column '{name}' has no value in training row {list(values).index(None)}; every row needs a source")
    sizes = Counter(values)
    if len(sizes) < clients:
        few = f"{len(sizes)} distinct values, too few for {clients} clients"
        raise DataError(f"column '{name}' has {few}; use {len(sizes)} clients, or another column")
    _insist_enough(rows, clients, minimum)
    ordered = sorted(sizes, key=lambda value: (type(value).__name__, value))
    device = {value: k for k, value in enumerate(ordered)} if len(sizes) == clients else pack(ordered, sizes, clients, seed)
    shards = group(np.fromiter((device[value] for value in values), np.int64, rows), clients)
    small = min(range(clients), key=lambda k: len(shards[k]))
    if len(shards[small]) < minimum:
        held = ", ".join(repr(value) for value in ordered if device[value] == small)
        raise DataError(
            f"the client of {name} = {held} would have {len(shards[small])} training rows, and the minimum is {minimum}; "
            f"lower the minimum, or use fewer clients so that sources share a device"
        )
    scheme: Scheme = {"how": f"column:{name}", "clients": clients, "values": len(sizes), "seed": seed, "minimum": minimum}
    owners: dict[Split, np.ndarray] = {
        s: np.fromiter((device.get(v, -1) for v in of), np.int64, len(of)) for s, of in columns.items() if s != "train"
    }
    return _with_held_out(shards, labels, scheme, owners)


def told_of_column(name: str, columns: Mapping[Split, Sequence[Any]]) -> list[str]:
    """Which held-out rows :func:`by_column` cannot give to the client of their value, for a person."""
    trained, told = set(columns["train"]), []
    for split in HELD_OUT:
        if split not in columns:
            told.append(f"the {split} split has no column '{name}': its rows are dealt by label")
        elif others := sum(value not in trained for value in columns[split]):
            told.append(
                f"{others} of the {len(columns[split])} {split} rows have a '{name}' that no training row has, and are dealt by label"
            )
    return told


def _label_counts(shards: Shards, labels: np.ndarray, classes: int) -> np.ndarray:
    return np.stack([np.bincount(labels[rows], minlength=classes) for rows in shards])


def _with_held_out(train: Shards, labels: Labels, scheme: Scheme, owners: Mapping[Split, np.ndarray] | None = None) -> Partition:
    """Add the held-out shards: label c's rows in proportion to the clients' training counts n_{k,c}, or n_k if nobody has c.

    ``owners``: whose a split's rows are, where that is settled; -1 where it is not.
    """
    classes = 1 + max((int(of.max()) for of in labels.values() if len(of)), default=0)
    counts = _label_counts(train, labels["train"], classes)
    held = {}
    for split in HELD_OUT:
        owner = (owners or {}).get(split, np.full(len(labels[split]), -1))
        free = np.flatnonzero(owner < 0)
        total = np.bincount(labels[split][free], minlength=classes)
        parts = np.zeros_like(counts)
        for c in np.flatnonzero(total):
            weights = counts[:, c] if counts[:, c].any() else counts.sum(1)
            parts[:, c] = apportion(int(total[c]), weights, derive(int(scheme["seed"]), "partition", "shares", split, int(c)))
        owner[free] = deal(labels[split][free], parts, int(scheme["seed"]), split)
        held[split] = group(owner, len(train))
    return Partition(train, held["validation"], held["test"], scheme | {"labels": _digest(labels)})


def _digest(labels: Labels) -> str:
    """Of all labels in order: another cut of the data has the same sizes but not the same digest."""
    digest = hashlib.sha256()
    for split in SPLITS:
        digest.update(np.asarray(labels[split], "<i8").tobytes() + b"|")
    return digest.hexdigest()[:16]


def _rows(value: Any) -> np.ndarray:
    """A list of whole numbers as int64, or TypeError."""
    if not isinstance(value, list) or any(type(row) is not int for row in value):
        raise TypeError("rows must be a list of whole numbers")
    return np.asarray(sorted(value), np.int64)


def _insist_enough(rows: int, clients: int, minimum: int) -> None:
    if clients < 1 or minimum < 1:
        raise DataError(f"a partition needs at least 1 client and 1 row each, not {clients} and {minimum}")
    if rows < clients * minimum:
        or_lower = f", or a minimum of at most {rows // clients}" if rows >= clients else ""
        mend = f"use at most {rows // minimum} clients{or_lower}"
        raise DataError(f"{rows} training rows cannot give {clients} clients {minimum} rows each; {mend}")


def _insist_cover(shards: Shards, size: int, what: str) -> None:
    """Every row 0..size-1 in exactly one shard."""
    rows = np.concatenate(shards) if shards else np.zeros(0, np.int64)
    outside = rows[(rows < 0) | (rows >= size)]
    if len(outside):
        raise DataError(f"{what}: row {outside[0]} is out of range; the split has rows 0 to {size - 1}")
    times = np.bincount(rows, minlength=size)
    if (times > 1).any():
        row = int(np.argmax(times > 1))
        owners = [k for k, shard in enumerate(shards) for _ in range(int((shard == row).sum()))]
        raise DataError(f"{what}: row {row} is listed {times[row]} times (clients {owners}); a row belongs to one client")
    if (times == 0).any():
        raise DataError(f"{what}: row {int(np.argmin(times))} belongs to no client ({int((times == 0).sum())} such rows)")


def _insist_fits(loaded: Partition, labels: Labels, path: str, clients: int, minimum: int) -> None:
    """The saved partition is of this data and of so many clients."""
    for split in SPLITS:
        saved, now = sum(map(len, loaded.shards(split))), len(labels[split])
        if saved != now:
            raise DataError(f"the partition file '{path}' is for {saved} {split} rows, and the data has {now}; it is of other data")
    if loaded.scheme.get("labels") != _digest(labels):
        why = "the sizes fit but the labels differ: it is of other data, or of a split cut by another seed"
        raise DataError(f"the partition file '{path}' does not fit; {why}")
    held = len(loaded.train)
    if held != clients:
        raise DataError(f"the partition file '{path}' has {held} clients, not {clients}; use {held} clients, or another file")
    small = min(range(clients), key=lambda k: len(loaded.train[k]))
    if len(loaded.train[small]) < minimum:
        few = f"{len(loaded.train[small])} training rows, and the minimum is {minimum}"
        raise DataError(f"client {small} of the partition file '{path}' has {few}; lower the minimum, or use another file")
