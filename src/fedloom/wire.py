"""What may cross between server and client, and how: one safetensors blob a message.

Tensors are stored as their bits (bfloat16 included), everything else as a JSON header in the blob's metadata. Nothing is ever
unpickled. Every message carries the experiment's digest, so that an answer to another experiment is refused. The local engine
packs and unpacks too: what deployment refuses, simulation refuses.

This module does not know methods, engines or transports.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

from fedloom.messages import Setting, Task, Tensors, Update

VERSION = 1
DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.int8,
    torch.uint8,
    torch.bool,
)
HEADER = "fedloom"


class WireError(ValueError):
    """A message that may not cross: what was wrong with it, and what would be right."""


def checked_settings(settings: Mapping[str, Any]) -> dict[str, Setting]:
    """Settings as plain values: str, int, float, bool, or a list of one of str, int, float.

    Raises:
        WireError: any other value; None, dict and tuple of mixed kinds are refused as deployment refuses them.
    """
    if not isinstance(settings, Mapping):
        raise WireError(f"settings are {settings!r}; they must map names to values")
    return {_name(name): _setting(name, value) for name, value in settings.items()}


def checked_tensors(tensors: Tensors, finite: bool) -> dict[str, torch.Tensor]:
    """Tensors ready for packing: on the CPU, contiguous, of a known dtype, without a graph.

    Raises:
        WireError: an unknown dtype, a value that is no tensor, or (with ``finite``) NaN or infinity.
    """
    ready = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise WireError(f"'{name}' is a {type(tensor).__name__}; only tensors and settings may cross")
        if tensor.dtype not in DTYPES:
            raise WireError(f"tensor '{name}' has dtype {tensor.dtype}; the wire knows {[str(d) for d in DTYPES]}")
        if finite and tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise WireError(f"tensor '{name}' holds NaN or infinity; training diverged (a lower lr is the usual mend)")
        ready[_name(name)] = tensor.detach().to("cpu").contiguous()
    return ready


def pack(message: Task | Update, digest: str) -> bytes:
    """One message as one blob. ``digest`` names the experiment it belongs to.

    Raises:
        WireError: something in the message may not cross.
    """
    if isinstance(message, Task):
        body: dict[str, Any] = {"kind": "task", "op": message.op, "settings": checked_settings(message.settings)}
    else:
        body = {
            "kind": "update",
            "num_examples": int(message.num_examples),
            "metrics": checked_settings(message.metrics),
            "flops": float(message.flops),
            "examples": int(message.examples),
        }
    header = {"version": VERSION, "digest": digest, "client": int(message.client), **body}
    tensors = checked_tensors(message.tensors, finite=isinstance(message, Update))
    storages = {tensor.untyped_storage().data_ptr() for tensor in tensors.values() if tensor.numel()}
    if len(storages) < sum(1 for tensor in tensors.values() if tensor.numel()):
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    return save_safetensors(tensors, {HEADER: json.dumps(header, sort_keys=True)})


def unpack(blob: bytes, digest: str) -> Task | Update:
    """The message in a blob made by :func:`pack` for the same experiment.

    Raises:
        WireError: not a message, another version, another experiment, or a value that may not cross.
    """
    header = _header(blob)
    if header["version"] != VERSION:
        raise WireError(f"message of wire version {header['version']}; this is version {VERSION}: use the same release on both sides")
    if header["digest"] != digest:
        raise WireError(f"message of experiment {header['digest']!r}; this is experiment {digest!r}")
    kind, client = header["kind"], _field(header, "client", int)
    if kind not in ("task", "update"):
        raise WireError(f"message of kind {kind!r}; there are 'task' and 'update'")
    try:
        tensors = dict(sorted(load_safetensors(blob).items()))  # the file format keeps no order, and sums depend on it
    except (SafetensorError, KeyError) as error:
        raise WireError(f"the message's tensors cannot be read: {error}") from error
    checked_tensors(tensors, finite=kind == "update")
    if kind == "task":
        return Task(_field(header, "op", str), client, tensors, checked_settings(_field(header, "settings", dict)))
    count, examples, flops = (_field(header, name, of) for name, of in (("num_examples", int), ("examples", int), ("flops", float)))
    if count < 0 or examples < 0 or not 0 <= flops < math.inf:
        raise WireError(f"an update with num_examples {count}, examples {examples}, flops {flops}; none may be negative or not finite")
    return Update(client, count, tensors, checked_settings(_field(header, "metrics", dict)), flops, examples)


def _header(blob: bytes) -> dict[str, Any]:
    try:
        (length,) = struct.unpack("<Q", blob[:8])
        if not 2 <= length <= len(blob) - 8:
            raise ValueError(f"a header of {length} bytes in a blob of {len(blob)}")
        header = json.loads(json.loads(blob[8 : 8 + length])["__metadata__"][HEADER])
        {header[key] for key in ("version", "digest", "client", "kind")}
        return header
    except (struct.error, ValueError, KeyError, TypeError, RecursionError) as error:
        raise WireError(f"not a Fedloom message ({type(error).__name__}: {error})") from error


def _field(header: Mapping[str, Any], name: str, kind: type[Any]) -> Any:
    """The header's field, which must be of exactly this kind."""
    if name not in header or type(header[name]) is not kind:
        found = repr(header[name]) if name in header else "not there"
        raise WireError(f"the message's field '{name}' is {found}; it must be a {kind.__name__}")
    return header[name]


def _name(name: object) -> str:
    if not isinstance(name, str) or not name or name.startswith("__"):
        raise WireError(f"{name!r} cannot name a tensor or setting; use a non-empty string without leading '__'")
    return name


def _setting(name: str, value: Any) -> Setting:
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise WireError(f"setting '{name}' is an integer of {value.bit_length()} bits; 64 may cross")
    if isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise WireError(f"setting '{name}' is {value}; settings must be finite")
        return value
    if isinstance(value, list | tuple):
        items = [_setting(name, item) for item in value]
        if len({type(item) for item in items}) <= 1 and all(isinstance(item, str | int | float) for item in items):
            return items  # type: ignore[return-value]
    raise WireError(f"setting '{name}' is {value!r}; a setting is a str, int, float or bool, or a list of one of these kinds")
