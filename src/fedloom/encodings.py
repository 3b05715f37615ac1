"""Messages made smaller on their way, at a loss that is measured: what ``--wire`` chooses.

    exact       every bit
    bf16, fp16  16 bits a number; fp16 is cut at ±65504
    int8        8 bits a number, q = round(127·x/c), c the largest size within each 256 numbers                    c in float32
    nf4         4 bits a number: the nearest of NF4's sixteen (QLoRA 2305.14314, appendix E) to x/c, c as above within 64   c in float32
    top-k       up only, the share of a device's changes that is largest in size, as values (float32) and places (int32);
                what was not sent is kept on the device and added to its next changes (error feedback, 1809.07599; 1901.09847)

**Down** the tensors themselves are encoded; the server keeps its own exact. **Up** it is the change: x_k − ŵ, ŵ being what the device
received; the server adds what it decodes to its exact w. So what the server learns is not rounded to the grid on which devices see it, and
a step that is smaller than the grid is not lost.

``up:NAME`` (``up:bf16``) encodes what goes up and sends down every bit.

Encoded are the float32 tensors of a task, and of an update those whose name and shape its task had. Everything else crosses exactly, and so
does a task that says so (``Task.exact``), which is how what is sent once and for all is handed out.
All of a message's encoded tensors are one vector, in order of names.

This module does not know engines, methods or how bytes are laid out (``wire.py``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from fedloom.messages import DIVERGED, Setting, Task, Tensors, Update
from fedloom.tensors import identical, rounded_up
from fedloom.wire import DIMENSIONS, Packer, WireError

NAMES = ("exact", "bf16", "fp16", "int8", "nf4", "top-k")
SHARE = 0.05
"""Of the changes that top-k sends, where none is given."""

CODES, SCALES, PLACES = "encoded/codes", "encoded/scales", "encoded/places"
WHICH, RANKS, SIZES = "encoded/names", "encoded/ranks", "encoded/sizes"
"""The settings of a task, and the metrics of an update, that say what the vector is made of: names, dimensions of each, all sizes."""

BLOCK = {"int8": 256, "nf4": 64}
"""How many numbers share a scale."""

FP16_MOST = 65504.0
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


@contextmanager
def whoever_encoded() -> Iterator[None]:
    """Whatever goes wrong with what came is a fault of what came: an honest message can be decoded, another may be anything.

    Raises:
        WireError: something went wrong.
    """
    try:
        yield
    except WireError:
        raise
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise WireError(f"what is encoded cannot be decoded ({type(error).__name__}: {error})") from error


@dataclass(frozen=True)
class Encoding:
    """One of :data:`NAMES`; ``share`` is top-k's. ``up_only``: what goes down is exact."""

    name: str = "exact"
    share: float = SHARE
    up_only: bool = False

    @staticmethod
    def of(text: str) -> Encoding:
        """``NAME``, ``top-k:SHARE``, or ``up:`` and one of these.

        Raises:
            ValueError: no such encoding, or a share that is none.
        """
        up_only = text.startswith("up:")
        name, colon, share = text.removeprefix("up:").partition(":")
        if name not in NAMES:
            raise ValueError(f"no wire '{name}'; there are {', '.join(NAMES)}, each also up alone, as up:bf16")
        if colon and name != "top-k":
            raise ValueError(f"'{text}': only top-k takes a share, as top-k:{SHARE}")
        try:
            given = float(share) if colon else SHARE
        except ValueError:
            given = math.nan
        if not 0 < given <= 1:
            raise ValueError(f"'{text}': the share of the changes that is sent must be a number above 0 and at most 1, as top-k:{SHARE}")
        return Encoding(name, given, up_only or name == "top-k")

    @property
    def exact(self) -> bool:
        """Whether nothing is lost."""
        return self.name == "exact"

    @property
    def exact_down(self) -> bool:
        """Whether nothing is lost of what goes down."""
        return self.exact or self.up_only

    @property
    def owes(self) -> bool:
        """Whether a device adds what it has not sent of a change to its next changes under that name: right of steps from what came, which
        add up, and of nothing else."""
        return self.name == "top-k"

    def size(self, numbers: int) -> int:
        """Bytes of tensors that so many float32 numbers come to, going down."""
        match "exact" if self.up_only else self.name:
            case "bf16" | "fp16":
                return 2 * numbers
            case "int8":
                return numbers + 4 * -(-numbers // BLOCK["int8"])
            case "nf4":
                return -(-numbers // 2) + 4 * -(-numbers // BLOCK["nf4"])
            case _:
                return 4 * numbers

    # ---- down -----------------------------------------------------------------------------------------------------------------

    def down(self, task: Task) -> Task:
        """The task as it travels."""
        if self.exact_down or task.exact:
            return task
        names = sorted(n for n, t in task.tensors.items() if t.dtype == torch.float32)
        if not names:
            return task
        kept = {n: t for n, t in task.tensors.items() if n not in set(names)}
        pieces = self._encoded(_joined(task.tensors, names))
        return replace(task, tensors={**kept, **pieces}, settings={**task.settings, **_shapes(task.tensors, names)})

    @whoever_encoded()
    def arrived(self, task: Task) -> Task:
        """The task as the device sees it: ŵ instead of w.

        Raises:
            WireError: it was not encoded so.
        """
        if self.exact_down or WHICH not in task.settings:
            return task
        names, shapes = _told(task.settings)
        vector = self._decoded(task.tensors, sum(map(math.prod, shapes)))
        return replace(task, tensors={**_plain(task.tensors), **_parted(vector, names, shapes)}, settings=_rest(task.settings))

    # ---- up -------------------------------------------------------------------------------------------------------------------

    def up(self, update: Update, task: Task, unsent: Tensors) -> tuple[Update, dict[str, torch.Tensor]]:
        """The update as it travels, and what was not sent of it. ``task``: as the device saw it. ``unsent``: of before, by name; of what
        is sent whole now, because the device was not sent it, nothing is owed any more.

        Raises:
            WireError: it holds NaN or infinity.
        """
        names = [] if self.exact else sorted(n for n, t in update.tensors.items() if _changed(t, task.tensors.get(n)))
        left = {n: t for n, t in unsent.items() if n in task.tensors or n not in update.tensors}
        if not names:
            return update, left
        change = _joined(update.tensors, names) - _joined(task.tensors, names)
        if not bool(torch.isfinite(change).all()):
            raise WireError(f"the update holds NaN or infinity; {DIVERGED} (a lower lr is the usual mend)")
        if self.name == "top-k":
            owed = [unsent[n] if _changed(update.tensors[n], unsent.get(n)) else torch.zeros_like(update.tensors[n]) for n in names]
            change = change + torch.cat([t.reshape(-1) for t in owed])
        pieces = self._encoded(change)
        if self.name == "top-k":
            rest = change - self._decoded(pieces, len(change))
            left |= _parted(rest, names, [list(update.tensors[n].shape) for n in names])
        kept = {n: t for n, t in update.tensors.items() if n not in set(names)}
        told: dict[str, Setting] = {**update.metrics, WHICH: names}
        return replace(update, tensors={**kept, **pieces}, metrics=told), left

    @whoever_encoded()
    def received(self, update: Update, task: Task) -> Update:
        """The update as the server sees it: w + what was decoded. ``task``: as the server made it.

        Raises:
            WireError: it was not encoded so, or tells of tensors that the task had not.
        """
        if WHICH not in update.metrics:
            return update
        names = _strings(update.metrics[WHICH])
        strangers = [n for n in names if n not in task.tensors or task.tensors[n].dtype != torch.float32 or n in update.tensors]
        if self.exact or strangers or len(set(names)) != len(names):
            raise WireError(f"an update that is encoded as no update of this experiment's wire '{self.name}' is: {strangers[:3]}")
        shapes = [list(task.tensors[n].shape) for n in names]
        change = self._decoded(update.tensors, sum(map(math.prod, shapes)))
        sums = _joined(task.tensors, names) + change
        if not bool(torch.isfinite(sums).all()):
            raise WireError(f"an encoded update whose numbers are too large; {DIVERGED}")
        whole = _parted(sums, names, shapes)
        return replace(update, tensors=dict(sorted({**_plain(update.tensors), **whole}.items())), metrics=_rest(update.metrics))

    # ---- one vector -----------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _encoded(self, vector: torch.Tensor) -> dict[str, torch.Tensor]:
        """(P,) in float32 as what travels of it."""
        match self.name:
            case "bf16":
                return {CODES: vector.to(torch.bfloat16)}
            case "fp16":
                return {CODES: vector.clamp(-FP16_MOST, FP16_MOST).to(torch.float16)}
            case "int8" | "nf4":
                return dict(zip((CODES, SCALES), coded(vector, self.name), strict=True))
            case _:
                places = vector.abs().topk(rounded_up(self.share, len(vector))).indices.sort().values
                return {CODES: vector[places], PLACES: places.to(torch.int32)}

    @torch.no_grad()
    def _decoded(self, pieces: Tensors, length: int) -> torch.Tensor:
        """(``length``,) in float32 from what travelled.

        Raises:
            WireError: these are no pieces of a vector of this length.
        """
        codes = pieces.get(CODES, torch.zeros(0))
        match self.name:
            case "bf16" | "fp16":
                wanted: dict[str, Any] = {CODES: (length, torch.bfloat16 if self.name == "bf16" else torch.float16)}
            case "int8":
                wanted = {CODES: (length, torch.int8), SCALES: (-(-length // BLOCK["int8"]), torch.float32)}
            case "nf4":
                wanted = {CODES: (-(-length // 2), torch.uint8), SCALES: (-(-length // BLOCK["nf4"]), torch.float32)}
            case _:
                sent = rounded_up(self.share, length)
                wanted = {CODES: (sent, torch.float32), PLACES: (sent, torch.int32)}
        found = {n: (t.numel(), t.dtype) for n, t in pieces.items() if n in (CODES, SCALES, PLACES) and t.dim() == 1}
        if found != wanted:
            raise WireError(f"'{self.name}' of {length} numbers is {wanted}; {found} came")
        match self.name:
            case "int8" | "nf4":
                return decoded(codes, pieces[SCALES], self.name, length)
            case "top-k":
                places = pieces[PLACES].long()
                if len(places) and not (int(places[0]) >= 0 and int(places[-1]) < length and bool((places.diff() > 0).all())):
                    raise WireError(f"places must ascend from 0 to {length - 1} at most; those that came begin with {places[:4].tolist()}")
                return torch.zeros(length).index_copy_(0, places, codes)
            case _:
                return codes.float()


EXACT = Encoding()


Few = Literal["int8", "nf4"]


def coded(vector: torch.Tensor, name: Few) -> tuple[torch.Tensor, torch.Tensor]:
    """(P,) in float32 as int8 (P,), or as two of nf4's codes a byte (⌈P/2⌉,), and each block's scale in float32."""
    scaled, scales = _scaled(vector, BLOCK[name])
    if name == "int8":
        return (127 * scaled).round().to(torch.int8), scales
    levels = torch.tensor(NF4, device=vector.device)
    nearest = torch.bucketize(scaled, (levels[1:] + levels[:-1]) / 2).to(torch.uint8)
    even = torch.cat([nearest, nearest.new_zeros(len(nearest) % 2)]).view(-1, 2)
    return even[:, 0] * 16 + even[:, 1], scales


def decoded(codes: torch.Tensor, scales: torch.Tensor, name: Few, length: int) -> torch.Tensor:
    """(``length``,) in float32 from what :func:`coded` made."""
    if name == "int8":
        return _unscaled(codes.float() / 127, scales, BLOCK[name])
    levels = torch.tensor(NF4, device=codes.device)
    pairs = torch.cartesian_prod(levels, levels).view(torch.int64).view(-1)  # both numbers of a byte as one, which is ten times as fast
    return _unscaled(pairs.index_select(0, codes.int()).view(torch.float32)[:length], scales, BLOCK[name])


class Sender:
    """Encodes and packs the tasks of one asking. Tensors that a task shares with the one before, name by name the same objects, are encoded
    and laid out once."""

    def __init__(self, digest: str, encoding: Encoding = EXACT) -> None:
        self.encoding, self._packer = encoding, Packer(digest)
        self._last: tuple[Tensors, Task] | None = None

    def pack(self, task: Task) -> bytearray:
        """The task as it travels.

        Raises:
            WireError: something in it may not cross.
        """
        if self.encoding.exact or task.exact:
            return self._packer.pack(task)
        if self._last is None or not identical(self._last[0], task.tensors):
            self._last = (task.tensors, self.encoding.down(replace(task, settings={})))
        made = self._last[1]
        return self._packer.pack(replace(task, tensors=made.tensors, settings={**task.settings, **made.settings}))


def _changed(made: torch.Tensor, sent: torch.Tensor | None) -> bool:
    return sent is not None and made.dtype == sent.dtype == torch.float32 and made.shape == sent.shape


def _joined(tensors: Tensors, names: Sequence[str]) -> torch.Tensor:
    return torch.cat([tensors[n].detach().cpu().reshape(-1) for n in names])


def _parted(vector: torch.Tensor, names: Sequence[str], shapes: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    parts = vector.split([math.prod(shape) for shape in shapes])
    return {n: part.reshape(tuple(shape)).clone() for n, part, shape in zip(names, parts, shapes, strict=True)}


def _scaled(vector: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x/c (P,) and c for each block; of nothing but zeros, zeros."""
    rows = torch.cat([vector, vector.new_zeros(-len(vector) % block)]).view(-1, block)
    scales = rows.abs().amax(dim=1)
    return (rows / torch.where(scales > 0, scales, 1)[:, None]).reshape(-1)[: len(vector)], scales


def _unscaled(scaled: torch.Tensor, scales: torch.Tensor, block: int) -> torch.Tensor:
    if len(scaled) % block == 0:
        return (scaled.view(-1, block) * scales[:, None]).view(-1)
    return scaled * scales.repeat_interleave(block)[: len(scaled)]


def _shapes(tensors: Tensors, names: Sequence[str]) -> dict[str, Setting]:
    return {
        WHICH: list(names),
        RANKS: [tensors[n].dim() for n in names],
        SIZES: [size for n in names for size in tensors[n].shape],
    }


def _told(settings: Mapping[str, Setting]) -> tuple[list[str], list[list[int]]]:
    """Names and shapes as :func:`_shapes` said them.

    Raises:
        WireError: they do not fit each other.
    """
    names, ranks, sizes = _strings(settings[WHICH]), _counts(settings.get(RANKS)), _counts(settings.get(SIZES))
    if len(ranks) != len(names) or sum(ranks) != len(sizes) or len(set(names)) != len(names) or max(ranks) > DIMENSIONS:
        raise WireError(
            f"{len(names)} encoded tensors of {len(ranks)} ranks with {len(sizes)} sizes; one rank a name, of {DIMENSIONS} at most, and so "
            "many sizes"
        )
    at, shapes = 0, []
    for rank in ranks:
        shapes.append(sizes[at : at + rank])
        at += rank
    return names, shapes


def _strings(value: object) -> list[str]:
    if not (isinstance(value, list | tuple) and value and all(isinstance(item, str) for item in value)):
        raise WireError(f"the names of encoded tensors are {value!r}; they must be a list of strings, of one at least")
    return [str(item) for item in value]


def _counts(value: object) -> list[int]:
    if not (isinstance(value, list | tuple) and all(type(item) is int and 0 <= item < 2**40 for item in value)):
        raise WireError(f"the sizes of encoded tensors are {value!r}; they must be a list of whole numbers from 0 on")
    return [int(item) for item in value]  # type: ignore[arg-type]


def _plain(tensors: Tensors) -> dict[str, torch.Tensor]:
    return {n: t for n, t in tensors.items() if n not in (CODES, SCALES, PLACES)}


def _rest(settings: Mapping[str, Setting]) -> dict[str, Setting]:
    return {n: value for n, value in settings.items() if n not in (WHICH, RANKS, SIZES)}
