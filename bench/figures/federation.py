"""What a real federation costs beside compute: a server, devices as processes with resident workers, TLS on loopback, and nothing computed.

A round is everything between two states: tasks are packed, laid out, fetched over HTTPS with signed requests, handed to the workers,
echoed, and all the way back; the server checks what came and takes the mean. Everybody shares this machine's processors, so a round also
holds what four devices would do each on a processor of its own. Nothing is subtracted: an echo's own work is next to none. One federation
plays the soak, both sizes and the block after one another, a second one the 4 and then the 50 nodes; peaks are counted anew for each.

- **Seconds a round**, four devices, 1 MB and 32 MB each way.
- **A block of 500 MB**: two devices, one tensor. It passes, or there is no row. Peak memory is the server's above what it had before the
  round, over the block.
- **Memory and number of devices**: the server's peak with 50 nodes over that with 4, a tensor of 4 MB each. The nodes share a process and
  have no workers: only the server is looked at. Everything included, nothing subtracted.
- **Soak**: 1,000 rounds of 100 kB with four devices. Memory, threads and open files of the server: at the end against after 100 rounds.
- **Bytes of a round** for each ``--wire``, a device's task and update as they are packed, as a share of the tensor in float32.

NVFlare publishes the sizes of its quantized messages for a model of a billion parameters (5716 MB in float32, "Message Size under
Different Quantization Precisions", https://nvflare.readthedocs.io/en/2.6/programming_guide/message_quantization.html): 16 bits 50.00 %,
8 bits 25.03 %, 4 bits 14.06 %, scales included. Its 8 bits share a scale among more numbers than ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from bench.federating import Echoes, Part, blob, host, measured
from bench.figure import command
from bench.row import Row
from fedloom.encodings import NAMES
from fedloom.engines.engine import drive
from fedloom.engines.local import Local
from fedloom.messages import Replies
from fedloom.run.deployment.certificates import issue

DEVICES, NODES = 4, 50
SIZES = {"1 MB": (250_000, 20, 1.0), "32 MB": (8_000_000, 5, 5.0)}
"""Floats of the tensor, rounds measured, and the seconds that a round may take."""

BLOCK, LARGE = 125_000_000, 1_000_000
"""Floats: of the 500 MB that must pass, and of what 4 and 50 nodes echo."""

SOAK, SETTLED, LOOKS = 1000, 100, 100
"""Rounds of the soak, rounds after which it is looked at first, and how often in all."""

GROWTH = {"resident memory": 1.1, "threads": 1.1, "open files": 1.1}
"""What the soak looks at, and how much more of it there may be at the end."""

NVFLARE = {"fp16": 50.0, "bf16": 50.0, "int8": 25.03, "nf4": 14.06}
"""Per cent of float32 that NVFlare tells."""


def measure(quick: bool) -> list[Row]:
    """All of it."""
    devices, few, many = (2, 2, 6) if quick else (DEVICES, DEVICES, NODES)
    less = 100 if quick else 1
    rounds, settled, looks = (6, 2, 6) if quick else (SOAK, SETTLED, LOOKS)
    parts = [Part(devices, 25_000, rounds - 1, every=rounds // looks)]
    parts += [Part(devices, floats // less, 2 if quick else count) for floats, count, _ in SIZES.values()]
    parts += [Part(2, BLOCK // less // 10 if quick else BLOCK, 1, warm=0)]
    with TemporaryDirectory(prefix="fedloom-bench-") as name:
        folder = Path(name)
        issue(folder, many, ("127.0.0.1",))
        soaked, *echoed, large = measured(folder, parts)
        crowded = measured(folder, [Part(count, LARGE // less, 3) for count in (few, many)], crowd=True)
    rows = [row for size, told in zip(SIZES, echoed, strict=True) for row in overhead(size, told, devices)]
    rows += block(large, parts[-1]) + nodes(dict(zip((few, many), crowded, strict=True)))
    return rows + soak(soaked, settled * looks // rounds, devices) + sizes(LARGE // less)


Told = Mapping[str, Any]
"""What the server told of a part."""


def overhead(size: str, told: Told, devices: int) -> list[Row]:
    """Seconds a round."""
    note = f"{devices} devices, a process and a resident worker each, TLS on loopback; wire, link and server mean included"
    samples = {"s a round": told["seconds"]}
    name = f"a round in which {DEVICES} real devices echo {size}"
    return [Row(name, median(told["seconds"]), "s", SIZES[size][2], None, "less", samples, note)]


def block(told: Told, part: Part) -> list[Row]:
    """A tensor that is a hundred times as large as one request may be."""
    above, note = told["peak"] - told["before"], f"{part.devices} devices, one tensor of 500 MB each way, no such round before"
    memory = f"the server's: {told['before']:.0f} MiB before the round, {told['peak']:.0f} MiB at most"
    samples = {"before, MiB": [told["before"]], "at most, MiB": [told["peak"]]}
    times = above * 2**20 / (4 * part.floats)
    return [
        Row("a round in which 2 real devices echo 500 MB", told["seconds"][0], "s", None, None, "less", {"s": told["seconds"]}, note),
        Row("peak memory of that round over the block", times, "x", None, None, "less", samples, memory),
    ]


def nodes(told: Mapping[int, Told]) -> list[Row]:
    """Whether the number of devices costs the server memory."""
    few, many = told
    samples = {f"{count} nodes, s a round": one["seconds"] for count, one in told.items()}
    samples |= {f"{count} nodes, {key}, MiB": [one[key]] for count, one in told.items() for key in ("before", "peak")}
    note = f"all echo 4 MB at once; {told[few]['peak']:.0f} MiB with {few}, {told[many]['peak']:.0f} MiB with {many}"
    name = f"peak memory of the server, {NODES} devices against {DEVICES}"
    return [Row(name, told[many]["peak"] / told[few]["peak"], "x", 1.1, 1.02, "less", samples, note)]


def soak(told: Told, first: int, devices: int) -> list[Row]:
    """What grows with the rounds, from the ``first`` looks on."""
    rows = []
    for (what, most), values in zip(GROWTH.items(), zip(*told["looks"], strict=True), strict=True):
        name, taken = f"{what} of the server after {SOAK:,} rounds against after {SETTLED}", list(values)
        note = (
            f"{devices} devices echo 100 kB; {max(taken[:first]):.0f} at most until then, {max(taken[-first:]):.0f} in the last {SETTLED}"
        )
        rows.append(Row(name, grown(taken, first), "x", most, 1.0, "less", {what: taken}, note))
    return rows


def grown(values: Sequence[float], first: int) -> float:
    """The most of the last ``first`` values over the most of the first ones: connections and threads come and go."""
    return max(values[-first:]) / max(values[:first])


def sizes(floats: int) -> list[Row]:
    """Bytes of a device's task and update, as they are packed, against the tensor in float32. The same on every machine."""
    rows = []
    for wire in NAMES:
        seen: list[Replies] = []
        drive(Echoes().round([0], blob(floats)), Local(host(wire)), seen=lambda _, replies, seen=seen: seen.append(replies))
        (cost,) = seen[0].traffic
        down, up = (100 * size / (4 * floats) for size in (cost.bytes_down, cost.bytes_up))
        published = f"; NVFlare tells {NVFLARE[wire]:.2f} %" if wire in NVFLARE else ""
        note = f"{down:.2f} % down, {up:.2f} % up, of {floats:,} float32{published}"
        name = f"bytes of a round, --wire {wire}, of float32"
        rows.append(
            Row(name, (down + up) / 2, "%", None, None, "less", {"down, bytes": [cost.bytes_down], "up, bytes": [cost.bytes_up]}, note)
        )
    return rows


if __name__ == "__main__":
    command(measure)
