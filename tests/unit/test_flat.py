"""Tensors of many clients as one matrix, of which each may have other rows."""

from __future__ import annotations

import torch

from fedloom.compute.flat import Flat

CPU = torch.device("cpu")
WHOLE = {"a": torch.zeros(2), "b": torch.zeros(5, 2), "c": torch.zeros(4, 3), "d": torch.zeros(4, 3)}
ROWS = [{"c": [0, 3], "d": [1]}, {"c": [], "d": [0, 1, 2]}, {"c": [0, 1, 2], "d": []}]


def clients() -> tuple[list[dict[str, torch.Tensor]], list[dict[str, torch.Tensor]]]:
    """Three clients' tensors, all numbers different, and their rows of c and d."""
    rows = [{n: torch.tensor(at, dtype=torch.int64) for n, at in mine.items()} for mine in ROWS]
    shapes = [{n: (len(at[n]), 3) if n in at else tuple(t.shape) for n, t in WHOLE.items()} for at in rows]
    counter = iter(range(1, 1000))
    made = [{n: torch.tensor([float(next(counter)) for _ in range(torch.Size(s).numel())]).view(s) for n, s in of.items()} for of in shapes]
    return made, rows


def test_what_was_joined_comes_out_again_for_each_client() -> None:
    made, rows = clients()
    flat = Flat(made[0], rows, WHOLE)
    matrix = flat.join(made, CPU)
    assert matrix.shape == (3, 2 + 10 + 9) and flat.size == 21
    for c, mine in enumerate(made):
        assert {n: t.tolist() for n, t in flat.one(matrix[c], c).items()} == {n: t.tolist() for n, t in mine.items()}


def test_a_part_of_the_clients_has_its_own_rows_and_their_gradients_come_back() -> None:
    made, rows = clients()
    flat = Flat(made[0], rows, WHOLE)
    for low, high in ((0, 3), (1, 3), (2, 3), (0, 1)):
        leaf = flat.join(made, CPU)[low:high].requires_grad_(True)
        split, kept = flat.split(leaf, low), flat.kept(low, high)
        total = torch.zeros(())
        for name in ("c", "d"):
            whole = kept[name].whole(split[name])
            for s, mine in enumerate(made[low:high]):
                due = torch.zeros(4, 3).index_copy(0, rows[low + s][name], mine[name])
                assert torch.equal(whole[s], due)
            total = total + (whole * whole).sum() / 2
        for name in ("a", "b"):
            assert torch.equal(split[name], torch.stack([mine[name] for mine in made[low:high]]))
        (gradient,) = torch.autograd.grad(total, leaf)
        assert torch.equal(gradient[:, 12:], leaf[:, 12:]) and not gradient[:, :12].any()


def test_without_rows_all_are_views_in_order_of_names() -> None:
    made, _ = clients()
    whole = [{n: t for n, t in mine.items() if n in "ab"} for mine in made]
    flat = Flat(whole[0])
    matrix = flat.join(whole, CPU)
    split = flat.split(matrix)
    assert list(split) == ["a", "b"] and not flat.kept(0, 3)
    matrix[1] = 7
    assert (split["b"][1] == 7).all()
