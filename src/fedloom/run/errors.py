"""What a run can be refused for, apart from its parts: whoever catches or tells it needs none of the libraries of a run."""

from __future__ import annotations

from fedloom.telling import Tellable


class ExperimentError(Tellable, ValueError):
    """A configuration that makes no sense, with what would."""


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used, or a folder that may not be written to."""
