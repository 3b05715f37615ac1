"""Stochastic Lanczos against dense eigenvalues: of random matrices, and of the Hessian of tiny models written out entry by entry."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from fedloom.compute import stacked as stacked_module
from fedloom.compute.serial import Serial
from fedloom.compute.spectrum import density, first_gap, lanczos, lipschitz
from fedloom.compute.stacked import Stacked
from fedloom.compute.work import Spectral, Spectrum
from fedloom.model.base import Model
from fedloom.seeds import derive
from tests import families, tiny
from tests.oracle.numpy_fibecfed import first_gap as derived_gap


def symmetric(size: int, seed: int) -> np.ndarray:
    made = np.random.default_rng(seed).standard_normal((size, size))
    return (made + made.T) / 2


def of(*matrices: np.ndarray):
    """The products with these matrices, a client a row."""
    whole = torch.from_numpy(np.stack(matrices)).float()
    return lambda vectors: torch.einsum("sij,sj->si", whole, vectors)


def start(size: int, *seeds: int) -> torch.Tensor:
    return torch.from_numpy(np.stack([np.random.default_rng(seed).standard_normal(size) for seed in seeds or (0,)])).float()


def test_as_many_steps_as_dimensions_give_all_eigenvalues() -> None:
    matrix = symmetric(20, 1)
    ((nodes, weights),) = density(of(matrix), [start(20)], 100)
    assert np.allclose(nodes, np.linalg.eigvalsh(matrix), atol=2e-5)
    vectors, unit = np.linalg.eigh(matrix)[1], start(20)[0].double().numpy()
    assert np.allclose(weights, (vectors.T @ unit) ** 2 / (unit @ unit), atol=1e-4)


@pytest.mark.parametrize("steps", [3, 6])
def test_m_nodes_have_the_first_2m_minus_1_moments_of_the_start(steps: int) -> None:
    matrix, unit = symmetric(30, 2) / 4, start(30, 3)[0].double().numpy()
    unit /= np.linalg.norm(unit)
    ((nodes, weights),) = density(of(matrix), [start(30, 3)], steps)
    assert len(nodes) == steps
    for power in range(2 * steps):
        assert weights @ nodes**power == pytest.approx(unit @ np.linalg.matrix_power(matrix, power) @ unit, rel=1e-4, abs=1e-5)


def test_an_exhausted_krylov_space_ends_early_and_zero_is_a_spectrum() -> None:
    two = np.diag([3.0] * 6 + [-1.0] * 4)
    ((nodes, weights),) = density(of(two), [start(10)], 10)
    assert np.allclose(nodes, [-1, 3], atol=1e-5)
    assert weights.sum() == pytest.approx(1)
    ((nodes, _),) = density(of(np.zeros((5, 5))), [start(5)], 5)
    assert nodes.tolist() == [0.0]


def test_many_probes_tell_the_share_of_eigenvalues_in_a_band() -> None:
    values = np.concatenate([np.linspace(-1, 1, 90), np.linspace(8, 9, 10)])
    basis = np.linalg.qr(symmetric(100, 4))[0]
    ((nodes, weights),) = density(of(basis @ np.diag(values) @ basis.T), [start(100, i) for i in range(60)], 12)
    assert weights.sum() == pytest.approx(1)
    assert np.all(np.diff(nodes) >= 0)
    assert weights[nodes > 5].sum() == pytest.approx(0.1, abs=0.01)


def test_full_orthogonalisation_makes_no_ghosts() -> None:
    """Without it an outlying eigenvalue comes again and again."""
    values = np.concatenate([np.linspace(0, 1, 60), [50.0]])
    basis = np.linalg.qr(symmetric(61, 5))[0]
    ((diagonal, beside),) = lanczos(of(basis @ np.diag(values) @ basis.T), start(61), 61)
    nodes = np.linalg.eigvalsh(np.diag(diagonal) + np.diag(beside, 1) + np.diag(beside, -1))
    assert (nodes > 25).sum() == 1


@pytest.mark.parametrize("bound", [0.01, 0.05, 0.3, 10.0])
def test_the_first_gap_is_that_of_the_sorted_eigenvalues(bound: float) -> None:
    values = np.sort(np.random.default_rng(6).standard_normal(40))
    due = derived_gap(values, bound)
    made = first_gap(values, np.full(40, 1 / 40), bound)
    assert (made is None) == (due is None)
    assert due is None or made == pytest.approx(due / 40)


def test_the_lipschitz_estimate_of_a_cubic() -> None:
    """∇F(P + Δ) − ∇F(P) = HΔ + c‖Δ‖Δ: the quotient is c‖Δ‖, and the largest counts."""
    hessian = of(symmetric(4, 7))
    moves = [torch.tensor([move]) for move in ([0.3, 0, 0, 0.4], [0, 2.0, 0, 0], [0.1, 0, 0, 0])]
    assert lipschitz(hessian, lambda move: hessian(move) + 3 * move.norm() * move, moves) == pytest.approx([6.0], rel=1e-4)


def test_clients_have_spectra_of_their_own_and_may_end_at_other_steps() -> None:
    """One row's space is exhausted after two steps, one's after one, one goes on to the end: each as alone."""
    matrices = [np.diag([3.0] * 6 + [-1.0] * 4), symmetric(10, 8), np.zeros((10, 10))]
    starts = [start(10, 1, 2, 3), start(10, 4, 5, 6)]
    together = density(of(*matrices), starts, 10)
    for s, matrix in enumerate(matrices):
        ((nodes, weights),) = density(of(matrix), [begin[s : s + 1] for begin in starts], 10)
        assert np.allclose(together[s][0], nodes, atol=1e-6) and np.allclose(together[s][1], weights, atol=1e-6)
    assert [len(nodes) for nodes, _ in together] == [4, 20, 2]
    moves = [torch.tensor([[1.0, 0], [1, 0]]), torch.tensor([[0, 3.0], [0, 1]])]
    zero = of(np.zeros((2, 2)), np.zeros((2, 2)))
    assert lipschitz(zero, lambda move: move.norm(dim=1, keepdim=True) * move, moves) == pytest.approx([3.0, 1.0])


def dense(model: Model, item: Spectrum) -> tuple[np.ndarray, np.ndarray, Callable[[np.ndarray], np.ndarray]]:
    """P, and of the batch's mean loss over the item's tensors the Hessian at P, entry by entry (autograd's own second derivatives), and the
    gradient anywhere."""
    names = sorted(n for n in item.at if item.over is None or n in item.over)
    flat = torch.cat([item.at[n].reshape(-1) for n in names])
    batch = Serial(model).batch(item.examples, item.batch)

    def loss(where: torch.Tensor) -> torch.Tensor:
        parts = where.split([item.at[n].numel() for n in names])
        return model.loss({**item.at, **{n: p.view(item.at[n].shape) for n, p in zip(names, parts, strict=True)}}, batch, torch.float32)

    def gradient(where: np.ndarray) -> np.ndarray:
        at = torch.from_numpy(where).float().requires_grad_(True)
        return torch.autograd.grad(loss(at), at)[0].double().numpy()

    return flat.double().numpy(), torch.autograd.functional.hessian(loss, flat).double().numpy(), gradient


@pytest.mark.parametrize(("family", "over"), [("bert", "lora"), ("gpt2", None), ("llama", "lora")])
def test_a_models_spectrum_is_that_of_its_dense_hessian(family: str, over: str | None) -> None:
    model = families.model(family)
    at = families.moved(model, 3)
    names = None if over is None else frozenset(n for n in at if "lora_" in n)
    item = Spectrum(at, tiny.clients()[1].train, np.arange(4), names, probes=2, steps=400, seed=5)
    (done,) = Serial(model).run([item])
    made: Spectral = done.result
    point, hessian, gradient = dense(model, item)
    values = np.linalg.eigvalsh(hessian)
    size = np.abs(values).max()
    assert made.nodes.min() == pytest.approx(values.min(), abs=1e-3 * size)
    assert made.nodes.max() == pytest.approx(values.max(), abs=1e-3 * size)
    assert all(np.abs(values - node).min() < 2e-3 * size for node in made.nodes[made.weights > 1e-6])
    assert made.weights.sum() == pytest.approx(1)
    assert done.flops > 0
    bounds = []
    for probe in (0, 1):
        move = derive(5, "spectrum", "move", probe).standard_normal(len(point), dtype=np.float32).astype(float)
        move *= 0.05 * np.linalg.norm(point) / np.linalg.norm(move)
        change = gradient(point + move) - gradient(point)
        bounds.append(np.linalg.norm(hessian @ move - change) / np.linalg.norm(move))
    assert made.lipschitz == pytest.approx(max(bounds), rel=1e-3)
    assert max(bounds) > 1.01 * min(bounds), "the largest is not any of them"


def test_equal_seeds_give_equal_spectra() -> None:
    model = families.model("bert")
    items = [Spectrum(families.moved(model, k), tiny.clients()[k].train, np.arange(3), steps=8, seed=k) for k in (0, 1)]
    for compute in (Serial(model), Stacked(model)):
        alone, again = compute.run(items), compute.run(items)
        for one, other in zip(alone, again, strict=True):
            assert np.array_equal(one.result.nodes, other.result.nodes)
            assert np.array_equal(one.result.weights, other.result.weights)
            assert one.result.lipschitz == other.result.lipschitz
        assert not np.array_equal(alone[0].result.nodes, alone[1].result.nodes)


def of_devices(model: Model, names: frozenset[str] | None = None) -> list[Spectrum]:
    """Of four devices, whose batches are of other sizes and lengths."""
    return [
        Spectrum(families.moved(model, k), tiny.clients()[k].train, np.arange(size), names, probes=2, steps=6, seed=k)
        for k, size in ((0, 4), (1, 3), (2, 5), (3, 1))
    ]


def test_a_spectrum_is_the_same_to_the_bit_in_any_company() -> None:
    """Of a model that runs packed, on a CPU, as everything else that a device asks for."""
    stacked, items = Stacked(families.model("bert")), of_devices(families.model("bert"))
    for item, made in zip(items, stacked.run(items), strict=True):
        (alone,) = stacked.run([item])
        assert np.array_equal(made.result.nodes, alone.result.nodes) and np.array_equal(made.result.weights, alone.result.weights)
        assert made.result.lipschitz == alone.result.lipschitz


@pytest.mark.parametrize("family", ["bert", "roberta", "gpt2", "llama"])
@pytest.mark.parametrize("over", [None, "lora"])
def test_spectra_of_many_devices_are_those_of_each(family: str, over: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of other sizes and lengths, tensors and seeds of their own, in one pass, as on a GPU; a few steps, so that every number is
    determined."""
    model = families.model(family)
    names = None if over is None else frozenset(n for n in model.initial if "lora_" in n)
    items = of_devices(model, names)
    alone, stacked, sizes = Serial(model).run(items), Stacked(model), []
    monkeypatch.setattr(model, "together_by", "mapped")
    inner = stacked_module.spectra
    monkeypatch.setattr(stacked_module, "spectra", lambda some, *how: (sizes.append(len(some)), inner(some, *how))[1])
    for one, other in zip(alone, stacked.run(items), strict=True):
        size = np.abs(one.result.nodes).max()
        assert np.allclose(one.result.nodes, other.result.nodes, atol=1e-4 * size)
        assert np.allclose(one.result.weights, other.result.weights, atol=1e-3)
        assert other.result.lipschitz == pytest.approx(one.result.lipschitz, rel=1e-3)
        assert (one.flops, one.examples) == (other.flops, other.examples)
    assert sizes == [4], "all four in one pass"
    spread = [one.result.nodes.max() for one in alone]
    assert max(spread) > 1.05 * min(spread), "a neighbour's spectrum would be noticed"


def test_a_model_that_cannot_be_mapped_is_told_and_goes_one_by_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = families.model("bert")
    item = Spectrum(families.moved(model, 1), tiny.clients()[1].train, np.arange(3), steps=4)

    def refuse(*_: object) -> None:
        raise RuntimeError("no batching rule")

    monkeypatch.setattr(type(model), "mapped", refuse)
    (one,), (other,) = Serial(model).run([item]), Stacked(model).run([item])
    assert np.array_equal(one.result.nodes, other.result.nodes)
    assert "does not run under vmap (no batching rule)" in caplog.text
