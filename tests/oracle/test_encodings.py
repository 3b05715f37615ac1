"""Every encoding of the wire against a loop over numbers; what it may lose; error feedback loses nothing in the end."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedloom.encodings import CODES, NAMES, NF4, PLACES, WHICH, Encoding, Sender
from fedloom.engines.local import gather
from fedloom.messages import Task, Update
from fedloom.tensors import nbytes
from fedloom.wire import WireError, pack, unpack

LOSSY = [name for name in NAMES if name != "exact"]
BOTH_WAYS = ["bf16", "fp16", "int8", "nf4"]


def tensors(seed: int, size: float = 1.0) -> dict[str, torch.Tensor]:
    """Odd sizes, so that blocks and pairs do not come out even, a scalar, an empty tensor, zeros, and what is not float32."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: torch.tensor(size * rng.standard_normal(shape)).float()  # noqa: E731
    return {
        "b": draw(7, 11),
        "a": draw(300),
        "s": draw(),
        "empty": torch.zeros(0, 3),
        "zero": torch.zeros(70),
        "count": torch.tensor([3, 4]),
        "exact": torch.tensor([1 / 3], dtype=torch.float64),
    }


def vector(of: dict[str, torch.Tensor]) -> list[float]:
    return [float(x) for name in sorted(of) if of[name].dtype == torch.float32 for x in of[name].reshape(-1)]


def blocks(x: list[float], size: int) -> list[list[float]]:
    return [x[i : i + size] for i in range(0, len(x), size)]


def decoded_int8(x: list[float]) -> list[float]:
    """q = round(127·x/c), c the largest size of 256 numbers; then c·q/127."""
    made = []
    for part in blocks(x, 256):
        c = max(map(abs, part))
        made += [c * round(127 * v / c) / 127 if c else 0.0 for v in part]
    return made


def decoded_nf4(x: list[float]) -> list[float]:
    """The nearest of sixteen levels to x/c, c the largest size of 64 numbers."""
    made = []
    for part in blocks(x, 64):
        c = max(map(abs, part))
        made += [c * min(NF4, key=lambda level: abs(v / c - level)) if c else 0.0 for v in part]
    return made


def as_sent(x: list[float], name: str) -> list[float]:
    match name:
        case "bf16":
            return [float(torch.tensor(v).to(torch.bfloat16)) for v in x]
        case "fp16":
            return [float(np.float16(min(max(v, -65504.0), 65504.0))) for v in x]
        case "int8":
            return decoded_int8(x)
        case _:
            return decoded_nf4(x)


@pytest.mark.parametrize("name", BOTH_WAYS)
@pytest.mark.parametrize("size", [1.0, 1e-6, 1e5])
def test_down_is_the_papers_rounding_of_what_is_sent(name: str, size: float) -> None:
    sent, encoding = tensors(1, size), Encoding.of(name)
    task = Task("train", 3, sent, {"round": 4})
    came = encoding.arrived(unpack(pack(encoding.down(task), "d"), "d"))  # type: ignore[arg-type]
    assert came.settings == task.settings and (came.op, came.client) == (task.op, task.client)
    assert {n: (t.shape, t.dtype) for n, t in came.tensors.items()} == {n: (t.shape, t.dtype) for n, t in sent.items()}
    assert vector(dict(came.tensors)) == pytest.approx(as_sent(vector(sent), name), rel=1e-5, abs=1e-7 * size)
    assert torch.equal(came.tensors["count"], sent["count"]) and torch.equal(came.tensors["exact"], sent["exact"])


@pytest.mark.parametrize("name", BOTH_WAYS)
def test_what_is_sent_once_and_for_all_travels_exactly(name: str) -> None:
    """And what shares its tensors with it, in the same asking, as it would without it."""
    encoding, task = Encoding.of(name), Task("train", 3, tensors(1), {"round": 4})
    handed = replace(task, op="receive", exact=True)
    assert encoding.down(handed) is handed and encoding.arrived(handed) is handed
    sender = Sender("d", encoding)
    assert sender.pack(handed) == pack(handed, "d") and sender.pack(task) == Sender("d", encoding).pack(task) != pack(task, "d")


@pytest.mark.parametrize("name", BOTH_WAYS)
def test_up_is_the_change_from_what_the_device_saw_added_to_what_the_server_has(name: str) -> None:
    sent, encoding = tensors(1), Encoding.of(name)
    task = Task("train", 3, sent)
    seen = encoding.arrived(encoding.down(task))
    made = {n: t + 0.01 * tensors(2)[n] if t.dtype == torch.float32 else t for n, t in seen.tensors.items()}
    update = Update(3, 9, {**made, "own": torch.ones(2)}, {"loss": 1.5})
    travelled, unsent = encoding.up(update, seen, {})
    assert not unsent and torch.equal(travelled.tensors["own"], torch.ones(2))
    told = encoding.received(unpack(pack(travelled, "d"), "d"), task)  # type: ignore[arg-type]
    changes = [m - s for m, s in zip(vector(made), vector(dict(seen.tensors)), strict=True)]
    due = [w + d for w, d in zip(vector(sent), as_sent(changes, name), strict=True)]
    assert vector({n: t for n, t in told.tensors.items() if n != "own"}) == pytest.approx(due, rel=1e-4, abs=1e-6)
    assert told.metrics == {"loss": 1.5} and list(told.tensors) == sorted(told.tensors)
    assert (told.client, told.num_examples) == (3, 9)


@pytest.mark.parametrize("name", BOTH_WAYS)
def test_up_alone_sends_down_every_bit_and_up_what_the_encoding_makes_of_the_change(name: str) -> None:
    sent, both, up = tensors(1), Encoding.of(name), Encoding.of(f"up:{name}")
    task = Task("train", 3, sent)
    assert up.down(task) is task and up.arrived(task) is task and up.size(100) == 400 > both.size(100)
    update = Update(3, 9, {n: t + 0.01 * tensors(2)[n] if t.dtype == torch.float32 else t for n, t in sent.items()})
    travelled, unsent = up.up(update, task, {})
    expected, _ = both.up(update, task, {})
    assert not unsent and pack(travelled, "d") == pack(expected, "d"), "the encoding's own bits"
    told = up.received(unpack(pack(travelled, "d"), "d"), task)  # type: ignore[arg-type]
    due = [w + d for w, d in zip(vector(sent), as_sent([0.01 * x for x in vector(tensors(2))], name), strict=True)]
    assert vector(dict(told.tensors)) == pytest.approx(due, rel=1e-4, abs=1e-6)


def test_steps_smaller_than_the_grid_are_not_lost() -> None:
    """A server that took the devices' rounded model over would stand still: 4 bits do not see a step of a thousandth."""
    encoding, w = Encoding.of("nf4"), {"x": torch.linspace(-1, 1, 64)}
    for _ in range(100):
        task = Task("train", 0, w)
        seen = encoding.arrived(encoding.down(task))
        travelled, _ = encoding.up(Update(0, 1, {"x": seen.tensors["x"] + 1e-3}), seen, {})
        w = dict(encoding.received(travelled, task).tensors)
    assert torch.allclose(w["x"], torch.linspace(-1, 1, 64) + 0.1, atol=1e-3)


@pytest.mark.parametrize("share", [0.05, 0.3, 1.0])
def test_top_k_sends_the_largest_changes_and_keeps_the_rest(share: float) -> None:
    sent, encoding = tensors(1), Encoding.of(f"top-k:{share}")
    task = Task("train", 0, sent)
    assert encoding.down(task) is task
    w, owed = vector(sent), [0.0] * len(vector(sent))
    unsent: dict[str, torch.Tensor] = {}
    for t in range(4):
        made = {n: x + tensors(10 + t)[n] if x.dtype == torch.float32 else x for n, x in sent.items()}
        travelled, unsent = encoding.up(Update(0, 1, made), task, unsent)
        told = encoding.received(travelled, task)
        wanted = [m - s + e for m, s, e in zip(vector(made), w, owed, strict=True)]
        count = math.ceil(share * len(wanted) - 1e-9)
        largest = set(sorted(range(len(wanted)), key=lambda i: -abs(wanted[i]))[:count])
        assert travelled.tensors[CODES].shape == travelled.tensors[PLACES].shape == (count,)
        due = [s + (d if i in largest else 0.0) for i, (s, d) in enumerate(zip(w, wanted, strict=True))]
        owed = [0.0 if i in largest else d for i, d in enumerate(wanted)]
        assert vector(dict(told.tensors)) == pytest.approx(due, abs=1e-5)
        assert vector(unsent) == pytest.approx(owed, abs=1e-5)


def test_error_feedback_sends_everything_in_the_end() -> None:
    """The same change again and again: what arrives in the mean is all of it. Without feedback the small ones never would."""
    encoding, task = Encoding.of("top-k:0.1"), Task("train", 0, {"x": torch.zeros(20)})
    change, total, unsent = torch.linspace(0.1, 1.0, 20), torch.zeros(20), {}
    for _ in range(400):
        travelled, unsent = encoding.up(Update(0, 1, {"x": change}), task, unsent)
        total += encoding.received(travelled, task).tensors["x"]
    assert torch.allclose(total / 400, change, atol=0.03)


def test_of_what_is_handed_over_whole_nothing_is_owed_any_more() -> None:
    """A layer that a device had kept and now hands over (FibecFed's next GAL) is all there; what was left of an earlier change to it is of
    another way that it went. Of what the device was sent, and of what it says nothing, it still owes."""
    encoding, owed = Encoding.of("top-k:0.1"), {n: torch.ones(20) for n in "xyz"}
    handed, left = encoding.up(Update(0, 1, {"x": torch.zeros(20)}), Task("hand_over", 0), owed)
    assert set(left) == {"y", "z"} and torch.equal(handed.tensors["x"], torch.zeros(20))
    _, left = encoding.up(Update(0, 1, {"x": torch.zeros(20), "y": torch.ones(20)}), Task("train", 0, {"y": torch.zeros(20)}), owed)
    assert set(left) == {"y", "z"} and not torch.equal(left["y"], owed["y"])


@pytest.mark.parametrize(("name", "most"), [("bf16", 0.501), ("fp16", 0.501), ("int8", 0.255), ("nf4", 0.142), ("top-k:0.05", 0.101)])
def test_bytes(name: str, most: float) -> None:
    sent, encoding = {"x": torch.randn(200, 300)}, Encoding.of(name)
    task = Task("train", 0, sent)
    up, _ = encoding.up(Update(0, 1, {"x": sent["x"] + 1}), task, {})
    assert nbytes(up.tensors) <= most * nbytes(sent)
    assert name.startswith("top-k") or nbytes(encoding.down(task).tensors) <= most * nbytes(sent)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(BOTH_WAYS), st.lists(st.floats(-(2.0**20), 2.0**20, width=32), max_size=200))
def test_rounding_is_bounded(name: str, numbers: list[float]) -> None:
    encoding, sent = Encoding.of(name), {"x": torch.tensor(numbers, dtype=torch.float32)}
    came = encoding.arrived(encoding.down(Task("train", 0, sent))).tensors["x"].tolist()
    if name in ("bf16", "fp16"):
        inside = [max(-65504.0, min(65504.0, x)) if name == "fp16" else x for x in numbers]
        assert came == pytest.approx(inside, rel=2.0**-8, abs=1e-7)
        return
    step, size = (1 / 253, 256) if name == "int8" else (0.152, 64)
    for mine, theirs in zip(blocks(numbers, size), blocks(came, size), strict=True):
        c = max(map(abs, mine))
        assert max(abs(a - b) for a, b in zip(mine, theirs, strict=True)) <= step * c


def test_exact_changes_nothing() -> None:
    task, update = Task("train", 0, tensors(1)), Update(0, 1, tensors(2))
    exact = Encoding.of("exact")
    assert exact.down(task) is task and exact.arrived(task) is task
    assert exact.up(update, task, {}) == (update, {}) and exact.received(update, task) is update


@pytest.mark.parametrize("name", LOSSY)
def test_an_update_that_is_not_encoded_so_is_refused(name: str) -> None:
    encoding, task = Encoding.of(name), Task("train", 0, {"x": torch.zeros(300), "n": torch.tensor([1])})
    good, _ = encoding.up(Update(0, 1, {"x": torch.randn(300)}), task, {})
    encoding.received(good, task)

    def refused(**changes: object) -> None:
        with pytest.raises(WireError):
            encoding.received(replace(good, **changes), task)  # type: ignore[arg-type]

    for piece in good.tensors:
        refused(tensors={n: t for n, t in good.tensors.items() if n != piece})
        refused(tensors={**good.tensors, piece: good.tensors[piece][:-1]})
        refused(tensors={**good.tensors, piece: good.tensors[piece][:, None]})
        refused(tensors={**good.tensors, piece: good.tensors[piece].double()})
    refused(metrics={WHICH: ["y"]})
    refused(metrics={WHICH: ["n"]})
    refused(metrics={WHICH: ["x", "x"]})
    refused(metrics={WHICH: "x"})
    refused(metrics={WHICH: [1]})
    refused(metrics={WHICH: []})
    refused(metrics={WHICH: []}, tensors={n: t[:0] for n, t in good.tensors.items()})
    refused(tensors={**good.tensors, "x": torch.zeros(300)})
    with pytest.raises(WireError):
        Encoding.of("exact").received(good, task)
    if name == "top-k":
        for places in ([-1], [300]):
            wrong = good.tensors[PLACES].clone()
            wrong[-1 if places[0] else 0] = places[0]
            refused(tensors={**good.tensors, PLACES: wrong})
        refused(tensors={**good.tensors, PLACES: torch.full_like(good.tensors[PLACES], 5)})


@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_does_not_travel_as_a_number(name: str, wrong: float) -> None:
    made = torch.zeros(100)
    made[7] = wrong
    with pytest.raises(WireError, match="NaN or infinity"):
        Encoding.of(name).up(Update(0, 1, {"x": made}), Task("train", 0, {"x": torch.zeros(100)}), {})


@pytest.mark.parametrize("name", ["bf16", "int8", "nf4", "top-k"])
def test_a_change_that_takes_a_number_out_of_float32_is_its_devices_fault(name: str) -> None:
    """Both are finite, and so is what travels; w + Δ is not. A smaller change is taken."""
    task = Task("train", 0, {"x": torch.full((100,), 3e38)})
    for size, well in ((1.5e38, False), (1e37, True)):
        codes = Update(0, 1, Encoding.of(name)._encoded(torch.full((100,), size)), {WHICH: ["x"]})
        assert all(bool(torch.isfinite(t.float()).all()) for t in codes.tensors.values())
        if well:
            assert bool(torch.isfinite(Encoding.of(name).received(codes, task).tensors["x"]).all())
        else:
            with pytest.raises(WireError, match="an encoded update whose numbers are too large"):
                Encoding.of(name).received(codes, task)


@pytest.mark.parametrize("name", BOTH_WAYS)
def test_a_task_that_is_not_encoded_so_is_refused(name: str) -> None:
    encoding = Encoding.of(name)
    good = encoding.down(Task("train", 0, {"x": torch.zeros(3, 100)}))
    for change in ({"encoded/sizes": [3, 99]}, {"encoded/sizes": [3]}, {"encoded/ranks": [2, 2]}, {"encoded/sizes": [-3, -100]}):
        with pytest.raises(WireError):
            encoding.arrived(replace(good, settings={**good.settings, **change}))
    none = {WHICH: [], "encoded/ranks": [], "encoded/sizes": []}
    for change in (none, {"encoded/ranks": [1000], "encoded/sizes": [2**39] * 1000}):
        for there in (good.tensors, {n: t[:0] for n, t in good.tensors.items()}):
            with pytest.raises(WireError):
                encoding.arrived(replace(good, settings={**good.settings, **change}, tensors=there))
    for gone in ("encoded/sizes", "encoded/ranks"):
        with pytest.raises(WireError):
            encoding.arrived(replace(good, settings={n: v for n, v in good.settings.items() if n != gone}))


@pytest.mark.parametrize("name", LOSSY)
def test_an_update_of_no_encoded_tensor_is_its_devices_failure(name: str) -> None:
    encoding, task = Encoding.of(name), Task("train", 0, {"x": torch.zeros(300)})
    good, _ = encoding.up(Update(0, 1, {"x": torch.randn(300)}), task, {})
    blob = pack(replace(good, metrics={WHICH: []}, tensors={n: t[:0] for n, t in good.tensors.items()}), "d")
    (failure,) = gather([task], [0], [blob], "d", encoding).failures
    assert failure.reason.startswith("WireError: the names of encoded tensors are []")


def test_whatever_goes_wrong_with_what_is_encoded_is_its_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    task = Task("train", 0, {"x": torch.zeros(300)})
    encoding = Encoding.of("bf16")
    good, _ = encoding.up(Update(0, 1, {"x": torch.randn(300)}), task, {})

    def broken(self: Encoding, *rest: object) -> torch.Tensor:
        raise RuntimeError("shape '[-1, 64]' is invalid")

    monkeypatch.setattr(Encoding, "_decoded", broken)
    with pytest.raises(WireError, match="what is encoded cannot be decoded .RuntimeError: shape"):
        encoding.received(good, task)
    with pytest.raises(WireError, match="what is encoded cannot be decoded .RuntimeError: shape"):
        encoding.arrived(encoding.down(task))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("bf17", "no wire 'bf17'; there are exact, bf16, fp16, int8, nf4, top-k"),
        ("int8:4", "only top-k takes a share"),
        ("top-k:0", "above 0 and at most 1"),
        ("top-k:2", "above 0 and at most 1"),
        ("top-k:", "above 0 and at most 1"),
        ("top-k:nan", "above 0 and at most 1"),
    ],
)
def test_a_wire_that_there_is_not(text: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Encoding.of(text)
