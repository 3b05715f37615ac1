"""Arithmetic on LoRA's pairs: their products, pairs of another rank, and pairs made from a product.

A pair is A (r, d_in) and B (d_out, r) under partner names; its update of the weight W (d_out, d_in) that it stands on is s·B·A. Products
are kept by the name of that weight (:func:`~fedloom.model.names.under`), in float64. Where devices have pairs of different ranks, one of
rank r_k is the first r_k rows of A and columns of B, and all others are zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from fedloom.messages import Tensors
from fedloom.model.names import is_beneath, is_down, is_factor, is_up, partner, under
from fedloom.model.principal import principal_factors
from fedloom.seeds import derive, derive_int
from fedloom.tensors import Weightless


class Products:
    """Σ_k w_k·B_k·A_k over Σ_k w_k, of pairs that come one after another and are not kept: the mean of the products themselves."""

    def __init__(self) -> None:
        self._sums, self._weight = dict[str, torch.Tensor](), 0.0

    @torch.no_grad()
    def add(self, weight: float, tensors: Tensors) -> None:
        """Take a client's pairs in; tensors that are none are passed over."""
        self._weight += weight
        for name, product in products(tensors).items():
            self._sums[name] = self._sums[name] + weight * product if name in self._sums else weight * product

    def mean(self) -> dict[str, torch.Tensor]:
        """The mean, float64 (d_out, d_in) by the name of the weight beneath.

        Raises:
            Weightless: nothing came, or weights without a positive sum.
        """
        if not self._weight > 0:
            raise Weightless(f"a mean of products needs weights with a positive sum; it is {self._weight}")
        return {name: total / self._weight for name, total in self._sums.items()}


def products(tensors: Tensors) -> dict[str, torch.Tensor]:
    """B·A of every pair, float64 (d_out, d_in), by the name of the weight beneath."""
    return {under(n): b.double() @ tensors[partner(n)].double() for n, b in tensors.items() if is_up(n)}


def refactored(deltas: Mapping[str, torch.Tensor], like: Tensors, scaling: float) -> dict[str, torch.Tensor]:
    """Pairs shaped as those of ``like`` whose s·B·A is the best approximation of each delta (d_out, d_in), by its singular vectors: B =
    U_r (S_r/s)^(1/2), A = (S_r/s)^(1/2) V_rᵀ. The pair of a delta that is zero is left as it was: from zeros nothing could be learnt; the
    directions that a delta of a lower rank has not start as ``principal.py`` says."""
    made = {}
    for name in filter(is_down, like):
        delta, rank = deltas[under(name)], like[name].shape[0]
        pair = principal_factors(delta, rank, scaling) if bool(delta.any()) else (like[name], like[partner(name)])
        made[name], made[partner(name)] = pair
    return made


def rank_in(tensors: Tensors) -> int:
    """The rank of pairs that all have the same.

    Raises:
        ValueError: there are none, or of several ranks.
    """
    ranks = {tensor.shape[0] for name, tensor in tensors.items() if is_down(name)}
    if len(ranks) != 1:
        raise ValueError(f"one rank is needed in all pairs; they have {sorted(ranks)}")
    return ranks.pop()


def rank_of_pairs(tensors: Tensors) -> int:
    """The rank of the pairs, if there are any and all have the same; else 0."""
    ranks = {tensor.shape[0] for name, tensor in tensors.items() if is_down(name)}
    return ranks.pop() if len(ranks) == 1 else 0


def widened(tensors: Mapping[str, torch.Tensor], rank: int) -> dict[str, torch.Tensor]:
    """Pairs with zeros behind their directions up to ``rank``: the same function. Other tensors as they are."""
    made = {}
    for name, tensor in tensors.items():
        if is_factor(name):
            across = 0 if is_down(name) else 1
            shape = [*tensor.shape]
            shape[across] = rank - shape[across]
            tensor = torch.cat([tensor, tensor.new_zeros(shape)], across)
        made[name] = tensor
    return made


def cut(tensors: Tensors, rank: int) -> dict[str, torch.Tensor]:
    """Pairs of their first ``rank`` directions; other tensors as they are."""
    return {n: _of_rank(n, t, rank).clone() if is_factor(n) else t for n, t in tensors.items()}


def _of_rank(name: str, tensor: torch.Tensor, rank: int) -> torch.Tensor:
    return tensor[:rank] if is_down(name) else tensor[:, :rank]


def need_ranks(ranks: Sequence[int], tensors: Tensors, who: str) -> None:
    """For methods whose devices have several ranks.

    Raises:
        ValueError: one below 1, or above the adapter's.
    """
    most = rank_in(tensors)
    if bad := [r for r in ranks if not 1 <= r <= most]:
        raise ValueError(
            f"'{who}' has devices of rank {bad}, and the adapter's rank is {most}: 1 to {most} are possible; see --adapter.rank"
        )


def need_room(tensors: Tensors, who: str) -> None:
    """For methods that make pairs by decomposing what stands where they stand.

    Raises:
        ValueError: a pair of a higher rank than its weight can have.
    """
    for name in filter(is_down, tensors):
        rank, d_in = tensors[name].shape
        d_out, most = tensors[partner(name)].shape[0], min(tensors[partner(name)].shape[0], d_in)
        if rank > most:
            raise ValueError(
                f"'{who}' makes pairs by SVD, and '{under(name)}' is {d_out} × {d_in}: it has {most} directions at most, and the adapter's "
                f"rank is {rank}; give --adapter.rank {most} or less"
            )


def rank_of(client: int, ranks: Sequence[int], seed: int, strength: float | None = None) -> int:
    """A device's rank, once and for all: of ``ranks`` the highest that is no more than its ``strength`` (above 0 and at most 1) of the
    highest, or the lowest where none is; drawn where nothing is known of its strength."""
    if strength is None:
        return ranks[derive_int(seed, "rank", client) % len(ranks)]
    return max((rank for rank in ranks if rank <= strength * max(ranks)), default=min(ranks))


def quarters(rank: int) -> tuple[int, ...]:
    """A quarter, half and all of a rank, 1 at least: what devices have where nobody says it."""
    return (max(1, rank // 4), max(1, rank // 2), rank)


def drawn(like: Tensors, seed: int, *path: str | int) -> dict[str, torch.Tensor]:
    """New A's, uniform in ±1/√d_in as PEFT draws them, shaped as those of ``like``."""
    names = sorted(filter(is_down, like))
    sizes = {n: like[n].shape for n in names}
    draws = {n: derive(seed, "factors", *path, n).uniform(-1, 1, tuple(size)) / size[1] ** 0.5 for n, size in sizes.items()}
    return {n: torch.from_numpy(draw).float() for n, draw in draws.items()}


def need_zero_start(names: Tensors, who: str) -> None:
    """For methods that begin, or begin anew, at the function that the weights alone are; and for those that send a device a part of the
    pairs, where what another start has taken out of the weights would be missing.

    Raises:
        ValueError: a B that is not zero.
    """
    if any(bool(tensor.any()) for name, tensor in names.items() if is_up(name)):
        raise ValueError(f"'{who}' starts its pairs at zero or from there, and these start elsewhere; give it --adapter.start zero")


def moved(weights: Tensors, deltas: Tensors, scaling: float) -> dict[str, torch.Tensor]:
    """W + s·Δ for every weight under a pair."""
    names = filter(is_beneath, weights)
    return {n: (weights[n].double() + scaling * deltas[n]).to(weights[n].dtype) for n in names}
