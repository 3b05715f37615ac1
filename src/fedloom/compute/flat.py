"""Named tensors of many clients as one matrix, a client a row."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch

from fedloom.messages import Tensors
from fedloom.model.layout import RowsKept


class Flat:
    """Named tensors as rows (P,) of a matrix (S, P) and back, in one fixed order of names.

    Tensors of which each client has other rows (and other numbers of them) come last. Together they take as many numbers for every client,
    so nothing is padded: where one ends and the next begins differs from client to client.
    """

    def __init__(self, one: Tensors, rows: Sequence[Tensors] = (), whole: Tensors | None = None) -> None:
        """``one``: a client's tensors. ``rows``: for each client, which rows of the tensors named it has (k,), the same names for all;
        ``whole``: those tensors with all their rows."""
        self.some = sorted(rows[0]) if rows else []
        self.shapes = {n: t.shape for n, t in sorted(one.items()) if n not in self.some}
        self.sizes = [shape.numel() for shape in self.shapes.values()]
        self.behind = sum(self.sizes)
        self.size = self.behind + sum(one[n].numel() for n in self.some)
        self.rows = [{n: mine[n].numpy() for n in self.some} for mine in rows]
        self.tall = {n: (whole or {})[n].shape[0] for n in self.some}
        self.wide = {n: one[n].shape[1:] for n in self.some}

    def join(self, clients: Sequence[Tensors], device: torch.device, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """(S, P) in ``dtype``, a copy."""
        matrix = torch.empty(len(clients), self.size, dtype=dtype)
        for row, tensors in zip(matrix, clients, strict=True):
            if self.size:
                torch.cat([tensors[n].detach().reshape(-1).to("cpu", dtype) for n in (*self.shapes, *self.some)], out=row)
        return matrix.to(device)

    def split(self, matrix: torch.Tensor, first: int = 0) -> dict[str, torch.Tensor]:
        """{name: (S, …)} of (S, P), views where all have all rows, else (S, most, …) padded with nothing that counts. Row 0 is client
        ``first``."""
        parts = matrix[:, : self.behind].split(self.sizes, 1)
        made = {n: part.view(-1, *shape) for (n, shape), part in zip(self.shapes.items(), parts, strict=True)}
        behind = matrix[:, self.behind :]
        for n in self.some:
            at = self._places[n][first : first + len(matrix)].to(matrix.device)
            width = self.wide[n].numel()
            numbers = at[..., None] + torch.arange(width, device=at.device)
            made[n] = behind.gather(1, numbers.view(len(matrix), -1)).view(*at.shape, *self.wide[n])
        return made

    def kept(self, low: int, high: int) -> dict[str, RowsKept]:
        """Which rows the clients ``low`` to ``high`` have."""
        return {
            n: RowsKept(counts[low:high], np.ascontiguousarray(index[low:high]), tall)
            for n, (counts, index, tall) in ((n, (k.counts, k.index, k.tall)) for n, k in self._kept.items())
        }

    def one(self, row: torch.Tensor, client: int = 0) -> dict[str, torch.Tensor]:
        """{name: …} of one client (P,), copies on the CPU."""
        parts = row[: self.behind].split(self.sizes)
        made = {n: part.view(shape) for (n, shape), part in zip(self.shapes.items(), parts, strict=True)}
        counts = [len(self.rows[client][n]) for n in self.some]
        ends = row[self.behind :].split([k * self.wide[n].numel() for n, k in zip(self.some, counts, strict=True)]) if self.some else ()
        made |= {n: end.view(k, *self.wide[n]) for n, k, end in zip(self.some, counts, ends, strict=True)}
        return {n: t.cpu().clone() for n, t in made.items()}

    @cached_property
    def _kept(self) -> dict[str, RowsKept]:
        return {n: RowsKept.of([mine[n] for mine in self.rows], self.tall[n]) for n in self.some}

    @cached_property
    def _places(self) -> dict[str, torch.Tensor]:
        """For each tensor of which clients have some rows, int64 (S, most): where, behind the whole tensors, each of its rows begins. What
        follows a client's last one points at the first, and nothing comes back from it."""
        ends = np.zeros(len(self.rows), np.int64)
        made = {}
        for n, kept in self._kept.items():
            width, most = self.wide[n].numel(), kept.index.shape[1]
            at = ends[:, None] + np.arange(most) * width
            made[n] = torch.from_numpy(np.where(np.arange(most) < kept.counts[:, None], at, 0))
            ends += kept.counts * width
        return made
