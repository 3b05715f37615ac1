"""The function modes in which a model is called, so that a part of the call can be made again later in the same ones."""

from __future__ import annotations

import copy
from contextvars import ContextVar
from typing import Any, Self

from torch.overrides import TorchFunctionMode

_entered: ContextVar[tuple[Mode, ...]] = ContextVar("entered", default=())


class Mode(TorchFunctionMode):
    """A mode that can be asked for while it is entered (:func:`entered`). All that changes in it during a call are attributes that are
    replaced, so that a shallow copy is the mode as it was (:func:`as_now`)."""

    def __enter__(self) -> Self:
        _entered.set((*_entered.get(), self))
        TorchFunctionMode.__enter__(self)
        return self

    def __exit__(self, *how: Any) -> None:
        TorchFunctionMode.__exit__(self, *how)
        _entered.set(_entered.get()[:-1])


def entered() -> tuple[Mode, ...]:
    """The modes that this call is in, the outermost first."""
    return _entered.get()


def as_now() -> tuple[Mode, ...]:
    """Copies of them, which stay as they are now."""
    return tuple(map(copy.copy, entered()))
