"""What may cross, bit for bit; what may not; and that from whatever bytes arrive only ``WireError`` ever comes out."""

from __future__ import annotations

import json
import struct
import time
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load, save

from fedloom.messages import Task, Update
from fedloom.tensors import fingerprint
from fedloom.wire import CODES, DTYPES, HEAD, HEADER, VERSION, Packer, WireError, checked_settings, checked_tensors, pack, size_of, unpack

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
    tensors = {n: torch.zeros(1, dtype=DTYPES[i % len(DTYPES)]) for i, n in enumerate(names)}  # the file's order is by dtype first
    got = unpack(pack(Task("op", 0, dict(reversed(tensors.items()))), DIGEST), DIGEST)
    assert list(got.tensors) == sorted(names)


def test_packing_is_a_function_of_the_message() -> None:
    assert pack(TASK, DIGEST) == pack(replace(TASK, settings=dict(reversed(TASK.settings.items()))), DIGEST)


def metadata(blob: bytes) -> dict[str, str]:
    return json.loads(blob[8 : 8 + int.from_bytes(blob[:8], "little")])["__metadata__"]


NAMED = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=6).filter(lambda name: not name.startswith("__")),
    st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 3), max_size=3)),
    max_size=6,
)


@given(NAMED)
def test_blobs_are_what_the_safetensors_library_makes(named: dict[str, tuple[torch.dtype, list[int]]]) -> None:
    tensors = {name: torch.arange(prod(shape)).reshape(shape).to(dtype) for name, (dtype, shape) in named.items()}
    for message in (Task("op", 0, tensors, {"ü": '\n\u2028"\\', "x": 0.1}), Update(0, 1, tensors)):
        blob = pack(message, DIGEST)
        assert blob == save(tensors, metadata(blob))
        assert size_of(message, DIGEST) == len(blob)
        got = unpack(blob, DIGEST).tensors
        assert list(got) == sorted(tensors) and fingerprint(got) == fingerprint(tensors)


def test_tensors_that_arrived_can_be_written_to_and_change_nothing_else() -> None:
    blob = bytes(pack(Task("op", 0, {"a": torch.ones(3), "b": torch.ones(3), "c": torch.ones(3).bfloat16()}), DIGEST))
    before, one, two = bytes(bytearray(blob)), unpack(blob, DIGEST), unpack(blob, DIGEST)
    one.tensors["a"].zero_()
    one.tensors["c"].zero_()
    assert blob == before
    assert one.tensors["b"].tolist() == two.tensors["a"].tolist() == two.tensors["c"].tolist() == [1, 1, 1]


def test_what_is_unpacked_lies_in_a_blob_that_can_be_written() -> None:
    tensors = {"a": torch.ones(3), "b": torch.arange(5), "c": torch.ones(3).bfloat16(), "d": torch.ones(1).double()}
    for message in (Task("op", 0, tensors), Update(0, 1, tensors)):
        blob = pack(message, DIGEST)
        got, begin = unpack(blob, DIGEST).tensors, np.frombuffer(blob, np.uint8).ctypes.data
        assert fingerprint(got) == fingerprint(tensors)
        assert all(begin <= tensor.data_ptr() < begin + len(blob) for tensor in got.values()), "the message stands once"


def test_what_begins_at_an_odd_address_is_copied() -> None:
    tensors = {"a": torch.ones(3), "d": torch.arange(5.0).double()}
    for odd in range(1, 8):
        blob = bytearray(odd) + pack(Task("op", 0, tensors), DIGEST)
        del blob[:odd]  # which moves nothing: it begins later
        got = unpack(blob, DIGEST).tensors
        assert fingerprint(got) == fingerprint(tensors) and all(tensor.data_ptr() % 8 == 0 for tensor in got.values())


def test_a_message_that_changed_after_packing_is_what_it_was() -> None:
    tensors = {"a": torch.ones(3)}
    blob = pack(Task("op", 0, tensors), DIGEST)
    tensors["a"].zero_()
    assert unpack(blob, DIGEST).tensors["a"].tolist() == [1, 1, 1]


def test_a_packer_makes_of_each_message_what_pack_makes() -> None:
    shared, other = {"a": torch.ones(3), "b": torch.zeros(2)}, {"a": torch.ones(3), "c": torch.zeros(2)}
    messages = [
        Task("op", 0, shared, {"round": 1}),
        Task("op", 12345, dict(shared), {"round": 1}),
        Task("another", 0, {"b": shared["b"], "a": shared["a"]}),
        Update(3, 4, shared),
        Task("op", 0, {"a": shared["a"]}),
        Task("op", 0, {}),
        Task("op", 0, other),
        Task("op", 0, {"a": other["a"], "d": other["c"]}),
        Task("op", 0, {"a": other["c"], "d": other["a"]}),
        Task("op", 0, shared),
    ]
    packer = Packer(DIGEST)
    assert [packer.pack(m) for m in messages] == [pack(m, DIGEST) for m in messages]


def test_a_packer_looks_at_every_update_even_of_tensors_that_a_task_brought() -> None:
    packer, tensors = Packer(DIGEST), {"w": torch.tensor([1.0, float("nan")])}
    packer.pack(Task("op", 0, tensors))
    for _ in range(2):
        with pytest.raises(WireError, match="'w' holds NaN"):
            packer.pack(Update(0, 1, tensors))


def test_a_packer_goes_on_after_a_message_that_may_not_cross() -> None:
    packer = Packer(DIGEST)
    for _ in range(2):
        with pytest.raises(WireError, match="dtype torch.complex64"):
            packer.pack(Task("op", 0, {"w": torch.zeros(2, dtype=torch.complex64)}))
    assert packer.pack(TASK) == pack(TASK, DIGEST)


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


@pytest.mark.parametrize("name", ["", "__metadata__", "__x", 3, None, "\ud800"])
def test_names_that_may_not_cross(name: object) -> None:
    for message in (Task("op", 0, {name: torch.ones(1)}), Task("op", 0, {}, {name: 1})):  # type: ignore[dict-item]
        with pytest.raises(WireError, match="cannot name"):
            pack(message, DIGEST)


def test_tensors_can_be_checked_without_packing_them() -> None:
    tensors = {"a": torch.ones(2, 2).T, "b": torch.ones(1, requires_grad=True), "c": torch.tensor(float("nan")).bfloat16()}
    ready = checked_tensors(tensors, finite=False)
    assert list(ready) == ["a", "b", "c"] and not ready["b"].requires_grad and all(t.is_contiguous() for t in ready.values())
    with pytest.raises(WireError, match="'c' holds NaN"):
        checked_tensors(tensors, finite=True)


def test_a_sparse_tensor_may_not_cross() -> None:
    with pytest.raises(WireError, match=r"'w' has layout torch.sparse_coo; send its dense form"):
        pack(Task("op", 0, {"w": torch.ones(2).to_sparse()}), DIGEST)


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
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("size", [2, 2**18 + 3])
def test_an_update_must_be_finite_on_both_sides(bad: float, dtype: torch.dtype, size: int) -> None:
    tensors = {"a": torch.ones(3, dtype=dtype), "w": torch.ones(size, dtype=dtype), "x": torch.ones(3, dtype=dtype)}
    tensors |= {"b": torch.ones(2, dtype=torch.int64), "c": torch.ones(1, dtype=torch.bool), "y": torch.ones(5), "z": torch.zeros(0)}
    tensors["w"][-1] = bad
    with pytest.raises(WireError, match="'w' holds NaN or infinity"):
        pack(Update(0, 1, tensors), DIGEST)
    header = {"version": VERSION, "digest": DIGEST, "client": 0, "nonce": "0" * 32, "kind": "update", "num_examples": 1, "metrics": {}}
    with pytest.raises(WireError, match="'w' holds NaN or infinity"):
        unpack(save(tensors, {HEADER: json.dumps({**header, "flops": 0.0, "examples": 0})}), DIGEST)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_exactly_the_finite_half_floats_cross(dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    finite = torch.isfinite(every)
    assert bits(unpack(pack(Update(0, 1, {"x": every[finite]}), DIGEST), DIGEST).tensors["x"]) == bits(every[finite])
    for value in every[~finite][:: 97 if dtype == torch.float16 else 7]:
        with pytest.raises(WireError, match="'x' holds NaN or infinity"):
            pack(Update(0, 1, {"x": value.clone()}), DIGEST)


def forged(**changes: object) -> bytes:
    """A task's blob whose header says something else; ``...`` removes a field."""
    header = {"version": VERSION, "digest": DIGEST, "client": 3, "nonce": "0" * 32, "kind": "task", "op": "train", "settings": {}}
    header = {k: v for k, v in {**header, **changes}.items() if v is not ...}
    return save({"w": torch.ones(1)}, {HEADER: json.dumps(header)})


FORGED = {
    "another version": (forged(version=VERSION + 1), "wire version 3; this is version 2: use the same release"),
    "another experiment": (forged(digest="f" * 16), "message of experiment 'ffffffffffffffff'; this is experiment '0123456789abcdef'"),
    "another kind": (forged(kind="letter"), "message of kind 'letter'; there are 'task' and 'update'"),
    "no kind": (forged(kind=...), "not a Fedloom message"),
    "no client": (forged(client=...), "not a Fedloom message"),
    "a client that is text": (forged(client="abc"), "field 'client' is 'abc'; it must be a int"),
    "an infinite client": (forged(client=float("inf")), "field 'client' is inf"),
    "no nonce": (forged(nonce=...), "field 'nonce' is not there"),
    "a nonce of another form": (forged(nonce="A" * 32), "32 hex digits are due"),
    "no operation": (forged(op=...), "field 'op' is not there"),
    "an operation that is none": (forged(op=None), "field 'op' is None"),
    "settings that are a list": (forged(settings=[]), "field 'settings' is"),
    "a setting that is none": (forged(settings={"a": None}), "setting 'a' is None"),
    "an update without numbers": (forged(kind="update"), "field 'num_examples' is not there"),
    "negative examples": (forged(kind="update", num_examples=-1, examples=0, flops=0.0, metrics={}), "none may be negative"),
    "nan flops": (forged(kind="update", num_examples=1, examples=0, flops=float("nan"), metrics={}), "none may be negative"),
    "a header that is a list": (save({}, {HEADER: "[1]"}), "not a Fedloom message"),
    "no header": (save({}, {}), "not a Fedloom message"),
    "an endless header": (struct.pack("<Q", HEAD + 1) + bytes(HEAD + 1), f"a header of {HEAD + 1} bytes in a blob of {HEAD + 9}; it may"),
    "an endless nest": (struct.pack("<Q", 10**5) + b"[" * 10**5, "not a Fedloom message"),
    "a dtype from the future": (
        (lambda h: struct.pack("<Q", len(h)) + h)(
            json.dumps(
                {
                    "__metadata__": {
                        HEADER: json.dumps({"version": VERSION, "digest": DIGEST, "client": 0, "nonce": "0" * 32, "kind": "task"})
                    },
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
    header = {"version": VERSION, "digest": DIGEST, "client": 3, "nonce": "0" * 32, "kind": "task", "op": "train", "settings": {}}
    with pytest.raises(WireError, match="cannot be read: KeyError: 'C64'"):
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


def listing(entries: object, size: int) -> bytes:
    """A task's blob whose header lists these tensors before ``size`` bytes."""
    said = json.dumps({"version": VERSION, "digest": DIGEST, "client": 3, "nonce": "0" * 32, "kind": "task", "op": "train", "settings": {}})
    header = json.dumps({"__metadata__": {HEADER: said}, **entries} if isinstance(entries, dict) else entries).encode()
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + bytes(size)


def f32(shape: Any, *offsets: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": list(offsets)}


LISTINGS: dict[str, tuple[object, int]] = {
    "two that fit": ({"b": f32([2], 0, 8), "a": f32([1, 1], 8, 12)}, 12),
    "nothing": ({}, 0),
    "empty ones anywhere": ({"a": f32([0], 4, 4), "b": f32([1], 0, 4), "c": f32([3, 0], 0, 0), "d": f32([0, 7], 4, 4)}, 4),
    "bytes that are nobody's": ({}, 4),
    "bytes left over": ({"a": f32([1], 0, 4)}, 8),
    "bytes that are not there": ({"a": f32([2], 0, 8)}, 4),
    "a gap": ({"a": f32([1], 0, 4), "b": f32([1], 8, 12)}, 12),
    "a start too late": ({"a": f32([1], 4, 8)}, 8),
    "an overlap": ({"a": f32([2], 0, 8), "b": f32([2], 4, 12)}, 12),
    "the same place twice": ({"a": f32([1], 0, 4), "b": f32([1], 0, 4)}, 4),
    "the same place for all": ({"a": f32([1], 0, 4), "b": f32([1], 0, 4)}, 8),
    "backwards": ({"a": f32([1], 4, 0)}, 4),
    "a shape too large": ({"a": f32([2], 0, 4)}, 4),
    "a shape too small": ({"a": f32([1], 0, 8)}, 8),
    "a negative shape": ({"a": f32([-1, -1], 0, 4)}, 4),
    "a negative offset": ({"a": f32([1], -4, 0)}, 4),
    "a shape of floats": ({"a": f32([1.0], 0, 4)}, 4),
    "a shape of truths": ({"a": f32([True], 0, 4)}, 4),
    "a shape that is text": ({"a": f32("1", 0, 4)}, 4),
    "a shape that is a number": ({"a": f32(1, 0, 4)}, 4),
    "a shape that is none": ({"a": f32(None, 0, 4)}, 4),
    "an offset that is a float": ({"a": f32([1], 0, 4.0)}, 4),
    "an offset that is a truth": ({"a": f32([1], False, 4)}, 4),
    "an offset that is text": ({"a": f32([1], "0", 4), "b": f32([1], 4, 8)}, 8),
    "an offset that is none": ({"a": f32([1], None, 4)}, 4),
    "one offset": ({"a": f32([1], 4)}, 4),
    "three offsets": ({"a": f32([1], 0, 4, 4)}, 4),
    "a shape beyond all bounds": ({"a": f32([2**62, 2**62, 2**62, 0], 0, 0)}, 0),
    "a number beyond 64 bits": ({"a": f32([2**70, 0], 0, 0)}, 0),
    "a name that is no text": ({"\ud800": f32([1], 0, 4)}, 4),
    "no dtype": ({"a": {"shape": [1], "data_offsets": [0, 4]}}, 4),
    "a dtype that is a list": ({"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}, 4),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, 4),
    "an entry that is a list": ({"a": [1]}, 4),
    "an entry that is none": ({"a": None}, 4),
    "a header that is a list": ([1], 0),
}


def verdict(blob: bytes) -> str | None:
    """What the safetensors library makes of it; None if it refuses."""
    try:
        return fingerprint(load(blob))
    except (SafetensorError, KeyError):
        return None


@pytest.mark.parametrize(("entries", "size"), LISTINGS.values(), ids=LISTINGS)
def test_what_the_safetensors_library_refuses_is_refused(entries: object, size: int) -> None:
    blob = listing(entries, size)
    if verdict(blob) is None:
        with pytest.raises(WireError):
            unpack(blob, DIGEST)
    else:
        assert fingerprint(unpack(blob, DIGEST).tensors) == verdict(blob)


def test_some_listings_are_taken_and_most_are_not() -> None:
    assert [name for name, of in LISTINGS.items() if verdict(listing(*of))] == list(LISTINGS)[:3]


def test_an_unaligned_tensor_is_refused() -> None:
    """The library takes it, but no message is packed so, and not every processor could read it in place."""
    blob = listing({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}, "b": f32([1], 1, 5)}, 5)
    assert verdict(blob)
    with pytest.raises(WireError, match="'b', torch.float32 of shape .*, cannot lie from 1 to 5 where 1 is next"):
        unpack(blob, DIGEST)


@pytest.mark.parametrize("more", [1, float("nan"), [[]], "text"])
def test_an_entry_that_says_more_is_refused(more: object) -> None:
    """The library takes some of these and refuses others; no message has any."""
    with pytest.raises(WireError, match="an entry must be a dtype, a shape and two offsets"):
        unpack(listing({"a": {**f32([1], 0, 4), "more": more}}, 4), DIGEST)


@pytest.mark.parametrize("more", [{"more": "x"}, {"more": 1}])
def test_metadata_that_says_more_is_refused(more: dict[str, Any]) -> None:
    entries = listing({}, 0)
    header = json.loads(entries[8:])
    header["__metadata__"] |= more
    with pytest.raises(WireError, match="not a Fedloom message"):
        unpack((lambda h: struct.pack("<Q", len(h)) + h)(json.dumps(header).encode()), DIGEST)


def test_a_shape_of_too_many_dimensions_is_refused() -> None:
    with pytest.raises(WireError, match="cannot be read"):
        unpack(listing({"a": f32([1] * 100, 0, 4)}, 4), DIGEST)


NUMBERS = st.sampled_from([0, 1, 2, 3, 4, 8, 12, 16, -4, 2**63, True, 4.0, None, "4"])
SIZES = {code: dtype.itemsize for dtype, code in CODES.items()}


@st.composite
def listings(draw: st.DrawFn) -> tuple[dict[str, Any], int]:
    """Entries that fit one after another, in any order of names; then perhaps some number of one of them is another."""
    entries: dict[str, Any] = {}
    at = 0
    for name in draw(st.permutations("abcd"))[: draw(st.integers(0, 4))]:
        code, shape = draw(st.sampled_from(["F32", "I32", "F32", "BOOL", "BF16"])), draw(st.lists(st.integers(0, 2), max_size=3))
        end = at + prod(shape) * SIZES[code]
        entries[name] = {"dtype": code, "shape": shape, "data_offsets": [at, end]}
        at = end
    if entries and draw(st.booleans()):
        numbers = entries[draw(st.sampled_from(sorted(entries)))][draw(st.sampled_from(["shape", "data_offsets"]))]
        if numbers:
            numbers[draw(st.integers(0, len(numbers) - 1))] = draw(NUMBERS)
    return dict(draw(st.permutations(list(entries.items())))), at + draw(st.sampled_from([0, 0, 0, 4]))


@settings(max_examples=400)
@given(listings())
def test_the_library_and_the_wire_agree_on_listings(made: tuple[dict[str, Any], int]) -> None:
    entries, size = made
    blob = listing(entries, size)
    due = verdict(blob)
    try:
        got = fingerprint(unpack(blob, DIGEST).tensors)
    except WireError:
        aligned = all(e["data_offsets"][0] % SIZES[e["dtype"]] == 0 for e in entries.values() if due)
        assert due is None or not aligned
    else:
        assert got == due


@given(st.sampled_from(PACKED), st.lists(st.integers(0, 8 * min(map(len, PACKED)) - 1), min_size=1, max_size=2, unique=True))
def test_what_is_taken_with_flipped_bits_the_library_takes_too(blob: bytes, places: list[int]) -> None:
    flipped = bytearray(blob)
    for place in places:
        flipped[place // 8] ^= 1 << place % 8
    try:
        got = unpack(bytes(flipped), DIGEST)
    except WireError:
        return
    assert fingerprint(got.tensors) == verdict(bytes(flipped))


def test_a_message_of_the_right_experiment_only() -> None:
    blob = pack(TASK, DIGEST)
    with pytest.raises(WireError, match="this is experiment 'another'"):
        unpack(blob, "another")


SHAPES = {"text": ("", 4), "an object": ({}, 4), "sixty-five dimensions": ([1] * 65, 4), "numbers of 65 bits": ([0, 2**64], 0)}


@pytest.mark.parametrize(("shape", "size"), SHAPES.values(), ids=SHAPES)
def test_a_shape_is_a_short_list_of_numbers_of_64_bits(shape: object, size: int) -> None:
    with pytest.raises(WireError, match="a shape must be a list of at most 64|more than 64 bits"):
        unpack(listing({"a": f32(shape, 0, size)}, size), DIGEST)


def test_a_shape_of_very_large_numbers_is_refused_at_once() -> None:
    began = time.process_time()
    with pytest.raises(WireError, match="a shape must be a list"):
        unpack(listing({"a": f32([10**4290] * 400, 0, 4)}, 4), DIGEST)
    assert time.process_time() - began < 1.0, "their product alone would take many seconds"


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize("depth", [1, 2, 300, 500, 700])
def test_a_setting_of_any_depth_is_refused(depth: int) -> None:
    with pytest.raises(WireError, match="setting 'a' is|RecursionError"):  # which of them depends on how deep the caller is
        unpack(forged(settings={"a": nested(depth)}), DIGEST)


MORE_FORGED = {
    "a client beyond 64 bits": (forged(client=10**4000), "client is an integer of 13288 bits; 64 may cross"),
    "an operation that is no text": (forged(op="\ud800"), "the operation is '\\ud800', which no encoding can write"),
    "a setting that is no text": (forged(settings={"a": ["x", "\ud800"]}), "setting 'a' is '\\ud800', which no encoding can write"),
    "examples beyond counting": (forged(kind="update", num_examples=2**53, examples=0, flops=0.0, metrics={}), "beyond what can be"),
    "work beyond counting": (forged(kind="update", num_examples=1, examples=0, flops=1e308, metrics={}), "beyond what can be"),
    "work on examples beyond counting": (forged(kind="update", num_examples=1, examples=10**4000, flops=0.0, metrics={}), "beyond what"),
}


@pytest.mark.parametrize(("blob", "says"), MORE_FORGED.values(), ids=MORE_FORGED)
def test_values_that_could_not_be_used_are_refused(blob: bytes, says: str) -> None:
    with pytest.raises(WireError) as said:
        unpack(blob, DIGEST)
    assert says in str(said.value)


UNUSABLE = [Task("op", 2**63), Task("\ud800", 0), Task("op", 0, {}, {"a": "\ud800"}), Update(0, 2**53), Update(0, 1, examples=2**53)]


@pytest.mark.parametrize("message", [*UNUSABLE, Update(0, 1, flops=1e308)], ids=str)
def test_what_would_be_refused_on_arrival_is_not_packed(message: Task | Update) -> None:
    with pytest.raises(WireError, match="64 may cross|no encoding|beyond what"):
        pack(message, DIGEST)


def test_the_largest_numbers_cross() -> None:
    for message in (Task("op", 2**63 - 1), Task("op", -(2**63)), Update(0, 2**53 - 1, flops=1e60, examples=2**53 - 1)):
        assert unpack(pack(message, DIGEST), DIGEST) == message


def test_an_error_is_short_however_long_what_came() -> None:
    with pytest.raises(WireError) as said:
        unpack(listing({"n" * 10**6: f32([2], 0, 4)}, 4), DIGEST)
    assert len(str(said.value)) < 1100
