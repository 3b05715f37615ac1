"""A run stands on the pre-trained weights that it began with and on the (A0, B0) that its checkpoint holds, whoever computes it next.

Where LoRA starts from singular vectors, what is frozen is W_res = W0 - s·B0·A0, so trained pairs mean something only beside the start that
was taken out of W0. Every process decomposes for itself when it loads its model. On the machine that began the run that gives the same
numbers again, bit for bit. Another machine's may differ in their last digits: then the checkpoint's are used, W_res is made from them, and
that is said. Workers (``--engine.workers``) and devices of a real federation use their own all the same, whose W_res is the run's to
rounding. Numbers that differ by more than rounding are of another model, or were altered: the run does not go on with them.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import torch

from fedloom.messages import Tensors
from fedloom.model.adapters import saved_as
from fedloom.model.base import Model
from fedloom.model.factors import products
from fedloom.model.names import is_drawn, is_factor
from fedloom.model.quantised import as_common
from fedloom.run.errors import CheckpointError
from fedloom.run.parts import Part, put, tensors_of
from fedloom.tensors import fingerprint, same_names

ROUNDING = 1e-4
"""How far apart two machines' s·B0·A0 may be, of its size in the Frobenius norm. Float32 rounds to 6e-8; singular values that lie close
together let directions turn, whose product turns far less."""


OR_ANOTHER = ", or give another --out"
"""What else mends a run that cannot go on, where a command has the option."""


def identity(model: Model) -> str:
    """16 hex digits over what every device must have alike: the pre-trained weights, and of those that an SVD has split what they were
    before (``Model.split``). Not the head nor what an adapter brings with it: those are drawn, and sent where they are shared."""
    model.stand_on({})  # its own, whatever a method has put in their place
    trained = set(model.parameters.values())
    brought = set() if saved_as(model.module) == "model" else trained
    split = set(model.beneath.names) if model.split else set()
    own = model.base(model.dtype).state_dict()
    common = {n: t for n, t in own.items() if n not in brought | split and not is_factor(n) and not is_drawn(n, trained)}
    common |= as_common(model.quantised)
    return hashlib.sha256(f"{fingerprint(common)}|{model.split}".encode()).hexdigest()[:16]


def start_of(model: Model) -> dict[str, torch.Tensor]:
    """(A0, B0) of every pair by saved name; nothing where pairs start at zero."""
    return {name: tensor for name, tensor in model.initial.items() if is_factor(name)} if model.split else {}


def begin_on_disk(model: Model, folder: Path) -> tuple[Part, ...]:
    """Have the start of a model in 16 bits that is trained whole lie in files of the run in ``folder``: float32 numbers that nothing
    computes with. Returns the parts, in which the first state then lies too; none of another model, whose start is small or its weights.
    """
    if model.dtype is torch.float32 or not model.is_whole:
        return ()
    place = folder / "checkpoints"
    place.mkdir(parents=True, exist_ok=True)
    parts = put(place, {f"shared/{name}": tensor for name, tensor in model.initial.items()})
    model.initial = {name.removeprefix("shared/"): tensor for name, tensor in tensors_of(parts).items()}
    return tuple(parts)


def begin_aside(model: Model, folder: Path) -> None:
    """The same for a process that has no run: the files lie in ``folder``, which is nobody else's, have no name by the time this returns,
    and are gone with the process, however that ends.

    Raises:
        DiskError: they could not be written.
    """
    shutil.rmtree(folder, ignore_errors=True)
    try:
        begin_on_disk(model, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def stand_at(model: Model, start: Tensors, folder: Path, known: str = "", otherwise: str = "") -> str:
    """Put the model at the ``start`` of the checkpoint in ``folder``. Returns what there is to say, or nothing. ``known``: the
    :func:`identity` that the checkpoint tells of its model ("": an earlier release's). ``otherwise``: what else would mend it.

    Raises:
        CheckpointError: the model is another one, or that is not its start, not even to rounding.
    """
    mend = f"Nothing was overwritten. Restore the model's files{otherwise}"
    said = _at(model, start, folder, mend)
    if known and known != (mine := identity(model)):
        raise CheckpointError(
            f"the pre-trained weights of '{model.name}' changed since {folder} began: they come to {mine} now, and came to {known}. {mend}"
        )
    return said


def _at(model: Model, start: Tensors, folder: Path, mend: str) -> str:
    own = start_of(model)
    if not own and not start:
        return ""
    if not start:
        return f"the checkpoint in {folder} is an earlier release's and holds no (A0, B0): this machine's own are used, unchecked"
    try:
        same_names(own, start)
    except ValueError as error:
        raise CheckpointError(f"the (A0, B0) in {folder} are not those of '{model.name}': {error}. {mend}") from error
    if all(torch.equal(tensor, start[name]) for name, tensor in own.items()):
        return ""
    here, there = products(own), products(start)
    apart = {name: float((there[name] - here[name]).norm() / here[name].norm()) for name in here}
    worst = max(apart, key=lambda name: apart[name])
    if not apart[worst] <= ROUNDING:
        raise CheckpointError(
            f"the (A0, B0) in {folder} are not those of '{model.name}': under '{worst}' their product differs by {apart[worst]:.2g} of its "
            f"size from the principal part of the weight here, and {ROUNDING:g} is allowed for another machine's rounding. The model was "
            f"changed since the run began, or the checkpoint was. {mend}"
        )
    model.start_at(start)
    return f"this machine decomposes the weights a little otherwise ({apart[worst]:.1g} apart); the checkpoint's (A0, B0) are used"
