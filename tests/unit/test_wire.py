"""What may cross, bit for bit; what may not; and that from whatever bytes arrive only ``WireError`` ever comes out."""

from __future__ import annotations

import json
import struct
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from fedloom.messages import Task, Update
from fedloom.tensors import fingerprint
from fedloom.wire import DTYPES, HEADER, VERSION, WireError, checked_settings, pack, unpack

DIGEST = "0123456789abcdef"
TASK = Task("train", 3, {"w": torch.arange(3.0)}, {"round": 1, "gal": [0, 2], "lr": 0.1, "name": "a", "on": True, "none": []})
UPDATE = Update(3, 7, {"w": torch.arange(3.0), "h": torch.ones(2).bfloat16()}, {"loss": 0.5}, 12.5, 4)


def of_dtype(dtype: torch.dtype) -> torch.Tensor:
    """Six values of this dtype, the extremes among them."""
    if dtype == torch.bool:
        return torch.tensor([True, False, True, True, False, False])
    if dtype.is_floating_point:
        info = torch.finfo(dtype)
        return torch.tensor([0.0, -0.0, info.max, info.min, info.smallest_normal, 1 / 3], dtype=torch.float64).to(dtype)
    info = torch.iinfo(dtype)
    return torch.tensor([0, 1, info.max, info.min, 7, 100], dtype=dtype)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(6,), (2, 3), (1, 6, 1)])
def test_every_dtype_and_shape_crosses_bit_for_bit(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    sent = {"x": of_dtype(dtype).reshape(shape), "scalar": of_dtype(dtype)[1].clone(), "empty": of_dtype(dtype)[:0].reshape(0, 2)}
    for message in (Task("op", 0, sent), Update(0, 1, sent)):
        got = unpack(pack(message, DIGEST), DIGEST).tensors
        assert {n: (t.dtype, t.shape, bits(t)) for n, t in got.items()} == {n: (t.dtype, t.shape, bits(t)) for n, t in sent.items()}


def test_all_65536_bfloat16_patterns_cross_in_a_task() -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    got = unpack(pack(Task("op", 0, {"x": every}), DIGEST), DIGEST).tensors["x"]
    assert got.dtype == torch.bfloat16
    assert bits(got) == bits(every)


def test_task_and_update_come_back_as_they_were() -> None:
    task = unpack(pack(TASK, DIGEST), DIGEST)
    assert replace(task, tensors={}) == replace(TASK, tensors={})
    assert fingerprint(task.tensors) == fingerprint(TASK.tensors)
    assert type(task.settings["on"]) is bool
    update = unpack(pack(UPDATE, DIGEST), DIGEST)
    assert replace(update, tensors={}) == replace(UPDATE, tensors={})
    assert fingerprint(update.tensors) == fingerprint(UPDATE.tensors)


BASE = torch.arange(12.0).reshape(3, 4)
SHARING = {
    "twice the same": {"a": BASE, "b": BASE},
    "overlapping views": {"a": BASE.view(-1)[:8], "b": BASE.view(-1)[4:]},
    "disjoint views": {"a": BASE[0], "b": BASE[2]},
    "a transposed view beside it": {"a": BASE.T, "b": BASE},
    "a stepped view": {"a": BASE[:, ::2]},
    "an expanded row": {"a": BASE[0].expand(5, 4)},
    "a graph": {"a": (BASE * 1).requires_grad_(True)},
}


@pytest.mark.parametrize("tensors", SHARING.values(), ids=SHARING)
def test_views_and_shared_storage_cross_as_values(tensors: dict[str, torch.Tensor]) -> None:
    for message in (Task("op", 0, tensors), Update(0, 1, tensors)):
        got = unpack(pack(message, DIGEST), DIGEST).tensors
        assert fingerprint(got) == fingerprint(tensors)
        assert len({t.untyped_storage().data_ptr() for t in got.values()}) == len(got)


def test_a_view_does_not_drag_its_whole_storage_along() -> None:
    big = torch.zeros(100_000)
    assert len(pack(Task("op", 0, {"a": big[:4]}), DIGEST)) < 1000


def test_names_arrive_sorted_however_they_were_sent() -> None:
    names = [f"n{i}" for i in range(20)]
    got = unpack(pack(Task("op", 0, {n: torch.zeros(1) for n in reversed(names)}), DIGEST), DIGEST)
    assert list(got.tensors) == sorted(names)


def test_packing_is_a_function_of_the_message() -> None:
    assert pack(TASK, DIGEST) == pack(replace(TASK, settings=dict(reversed(TASK.settings.items()))), DIGEST)


REFUSED = {
    "None": None,
    "a dict": {"a": 1},
    "bytes": b"a",
    "a mixed list": [1, "a"],
    "int and float": [1, 0.5],
    "a mixed tuple": (True, 1),
    "a nested list": [[1], [2]],
    "None in a list": [None],
    "nan": float("nan"),
    "infinity": float("-inf"),
    "nan in a list": [0.5, float("nan")],
    "a tensor": torch.ones(1),
    "65 bits": 2**63,
    "a set": {1, 2},
}


@pytest.mark.parametrize("value", REFUSED.values(), ids=REFUSED)
def test_settings_that_may_not_cross(value: object) -> None:
    with pytest.raises(WireError, match="setting 'value'"):
        pack(Task("op", 0, {}, {"value": value}), DIGEST)  # type: ignore[dict-item]
    with pytest.raises(WireError, match="setting 'value'"):
        pack(Update(0, 1, {}, {"value": value}), DIGEST)  # type: ignore[dict-item]


@pytest.mark.parametrize("settings", [None, [1], "a"])
def test_settings_must_have_names(settings: object) -> None:
    with pytest.raises(WireError, match="they must map names to values"):
        pack(Task("op", 0, {}, settings), DIGEST)  # type: ignore[arg-type]


def test_settings_that_may() -> None:
    given_ = {"a": (1, 2), "b": ["x"], "c": -(2**63), "d": False, "e": "ü", "f": 1e-300, "g": [1.5]}
    assert checked_settings(given_) == {**given_, "a": [1, 2]}


@pytest.mark.parametrize("name", ["", "__metadata__", "__x", 3, None])
def test_names_that_may_not_cross(name: object) -> None:
    for message in (Task("op", 0, {name: torch.ones(1)}), Task("op", 0, {}, {name: 1})):  # type: ignore[dict-item]
        with pytest.raises(WireError, match="cannot name"):
            pack(message, DIGEST)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn, torch.uint16])
def test_dtypes_that_may_not_cross(dtype: torch.dtype) -> None:
    for message in (Task("op", 0, {"w": torch.zeros(2, dtype=dtype)}), Update(0, 1, {"w": torch.zeros(2, dtype=dtype)})):
        with pytest.raises(WireError, match=r"'w' has dtype torch.*float32"):
            pack(message, DIGEST)


def test_what_is_no_tensor_may_not_cross() -> None:
    for value in ([1.0], None, 3.0):
        with pytest.raises(WireError, match="only tensors and settings"):
            pack(Update(0, 1, {"w": value}), DIGEST)  # type: ignore[dict-item]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_an_update_must_be_finite_on_both_sides(bad: float, dtype: torch.dtype) -> None:
    tensors = {"w": torch.tensor([1.0, bad], dtype=dtype)}
    with pytest.raises(WireError, match="'w' holds NaN or infinity"):
        pack(Update(0, 1, tensors), DIGEST)
    header = {"version": VERSION, "digest": DIGEST, "client": 0, "kind": "update", "num_examples": 1, "metrics": {}}
    with pytest.raises(WireError, match="'w' holds NaN or infinity"):
        unpack(save(tensors, {HEADER: json.dumps({**header, "flops": 0.0, "examples": 0})}), DIGEST)


def forged(**changes: object) -> bytes:
    """A task's blob whose header says something else; ``...`` removes a field."""
    header = {"version": VERSION, "digest": DIGEST, "client": 3, "kind": "task", "op": "train", "settings": {}}
    header = {k: v for k, v in {**header, **changes}.items() if v is not ...}
    return save({"w": torch.ones(1)}, {HEADER: json.dumps(header)})


FORGED = {
    "another version": (forged(version=VERSION + 1), "wire version 2; this is version 1: use the same release"),
    "another experiment": (forged(digest="f" * 16), "message of experiment 'ffffffffffffffff'; this is experiment '0123456789abcdef'"),
    "another kind": (forged(kind="letter"), "message of kind 'letter'; there are 'task' and 'update'"),
    "no kind": (forged(kind=...), "not a Fedloom message"),
    "no client": (forged(client=...), "not a Fedloom message"),
    "a client that is text": (forged(client="abc"), "field 'client' is 'abc'; it must be a int"),
    "an infinite client": (forged(client=float("inf")), "field 'client' is inf"),
    "no operation": (forged(op=...), "field 'op' is not there"),
    "an operation that is none": (forged(op=None), "field 'op' is None"),
    "settings that are a list": (forged(settings=[]), "field 'settings' is"),
    "a setting that is none": (forged(settings={"a": None}), "setting 'a' is None"),
    "an update without numbers": (forged(kind="update"), "field 'num_examples' is not there"),
    "negative examples": (forged(kind="update", num_examples=-1, examples=0, flops=0.0, metrics={}), "none may be negative"),
    "nan flops": (forged(kind="update", num_examples=1, examples=0, flops=float("nan"), metrics={}), "none may be negative"),
    "a header that is a list": (save({}, {HEADER: "[1]"}), "not a Fedloom message"),
    "no header": (save({}, {}), "not a Fedloom message"),
    "an endless nest": (struct.pack("<Q", 10**5) + b"[" * 10**5, "not a Fedloom message"),
    "a dtype from the future": (
        (lambda h: struct.pack("<Q", len(h)) + h)(
            json.dumps(
                {
                    "__metadata__": {HEADER: json.dumps({"version": 1, "digest": DIGEST, "client": 0, "kind": "task"})},
                    "w": {"dtype": "F8_E8M0", "shape": [0], "data_offsets": [0, 0]},
                }
            ).encode()
        ),
        "tensors cannot be read",
    ),
    "nothing": (b"", "not a Fedloom message"),
}


@pytest.mark.parametrize(("blob", "says"), FORGED.values(), ids=FORGED)
def test_forged_messages_are_refused_with_the_reason(blob: bytes, says: str) -> None:
    with pytest.raises(WireError) as said:
        unpack(blob, DIGEST)
    assert says in str(said.value)


def test_a_task_of_an_unknown_dtype_is_refused_on_arrival_too() -> None:
    header = {"version": VERSION, "digest": DIGEST, "client": 3, "kind": "task", "op": "train", "settings": {}}
    with pytest.raises(WireError, match="complex64"):
        unpack(save({"w": torch.zeros(1, dtype=torch.complex64)}, {HEADER: json.dumps(header)}), DIGEST)


def refused_or_message(blob: bytes) -> bool:
    """Whether it was refused; anything but ``WireError`` escapes and fails the test."""
    try:
        unpack(blob, DIGEST)
    except WireError:
        return True
    return False


@given(st.binary(max_size=300))
def test_random_bytes_are_refused(blob: bytes) -> None:
    assert refused_or_message(blob)


@given(st.binary(max_size=200))
def test_random_bytes_behind_a_plausible_length_are_refused(rest: bytes) -> None:
    assert refused_or_message(struct.pack("<Q", max(0, len(rest) - 1)) + rest)


@pytest.mark.parametrize("message", [TASK, UPDATE], ids=["task", "update"])
def test_a_truncated_message_is_refused_wherever_it_is_cut(message: Task | Update) -> None:
    blob = pack(message, DIGEST)
    assert all(refused_or_message(blob[:end]) for end in range(len(blob)))


PACKED = (pack(TASK, DIGEST), pack(UPDATE, DIGEST))


@given(st.sampled_from(PACKED), st.lists(st.integers(0, 8 * min(map(len, PACKED)) - 1), min_size=1, max_size=4, unique=True))
def test_flipped_bits_give_a_wire_error_or_another_message(blob: bytes, places: list[int]) -> None:
    flipped = bytearray(blob)
    for place in places:
        flipped[place // 8] ^= 1 << place % 8
    refused_or_message(bytes(flipped))


def test_a_flipped_bit_of_the_digest_or_the_length_is_always_refused() -> None:
    blob = PACKED[0]
    at = blob.index(DIGEST.encode())
    for place in [*range(8), *range(at, at + len(DIGEST))]:
        for bit in range(7):
            flipped = bytearray(blob)
            flipped[place] ^= 1 << bit
            assert refused_or_message(bytes(flipped))


def test_a_message_of_the_right_experiment_only() -> None:
    blob = pack(TASK, DIGEST)
    with pytest.raises(WireError, match="this is experiment 'another'"):
        unpack(blob, "another")
