"""Whatever ``data`` is, opened: a name, a folder, a file or a data set in memory as the tables of its splits. The only file that imports
``datasets``; only a name of the Hugging Face Hub touches the network.

It does not look at columns: ``reading.py`` does.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from fedloom.data.files import SUFFIXES, match_splits, read_file, read_folder, split_of
from fedloom.data.rows import class_names, whole_numbers
from fedloom.data.tasks import DataError, Split
from fedloom.hub import reachable

if TYPE_CHECKING:  # ``datasets`` takes a third of a second to load, and files need none of it
    import datasets

    Data = str | Path | datasets.Dataset | datasets.DatasetDict

PACKAGED = ("trec",)


@dataclass(frozen=True)
class Table:
    """One split: its rows, the class names its label columns carry, and (once known) a label id for every row."""

    rows: pa.Table
    names: dict[str, list[str]]
    ids: np.ndarray

    def take(self, rows: np.ndarray) -> Table:
        return Table(self.rows.take(whole_numbers(rows)), self.names, self.ids[rows])


def read(data: Data) -> tuple[str, dict[Split, Table], list[str]]:
    """Name, splits and notes of whatever ``data`` is."""
    if not isinstance(data, str | Path):
        import datasets

        if isinstance(data, datasets.DatasetDict):
            return "dataset", *_of_splits(data, "the DatasetDict")
        if isinstance(data, datasets.Dataset):
            return "dataset", {"train": _of_dataset(data)}, []
        raise DataError(f"data is a {type(data).__name__}; give a name, a path, or a Dataset or DatasetDict of the datasets library")
    if isinstance(data, str) and data in PACKAGED:
        with as_file(files("fedloom.data") / data) as folder:
            tables, notes = read_folder(folder)
        notes += [f"the packaged '{data}' is used; for the folder of that name write ./{data}"] if Path(data).exists() else []
        return data, {split: _of_table(table) for split, table in tables.items()}, notes
    path = Path(data).expanduser()
    if path.is_dir():
        where = path.resolve()
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            import datasets

            saved = datasets.load_from_disk(str(path))
            return where.name, *read(saved)[1:]
        tables, notes = read_folder(path)
        return where.name, {split: _of_table(table) for split, table in tables.items()}, notes
    if path.is_file():
        where = path.resolve()
        name = where.parent.name if split_of(where.stem) else where.stem
        return name, {"train": _of_table(read_file(path))}, []
    insist_on_a_place(data)
    return str(data), *_of_splits(_from_hub(str(data)), f"'{data}'")


def insist_on_a_place(data: str | Path) -> None:
    """Whether what names a file or folder, and no data set by name, is there.

    Raises:
        DataError: it is not.
    """
    path = Path(data).expanduser()
    local = isinstance(data, Path) or data.startswith((".", "/", "~")) or data.count("/") > 1 or path.suffix.lower() in SUFFIXES
    if not path.exists() and (local or (path.parent != Path() and path.parent.is_dir())):
        raise DataError(f"there is no file or folder '{data}'; {_nearby(path)}")


def _nearby(path: Path) -> str:
    """What the nearest existing parent of a missing path has."""
    near = next(parent for parent in path.absolute().parents if parent.is_dir())
    names = sorted(entry.name for entry in near.iterdir() if not entry.name.startswith("."))
    return f"'{near}' has: {', '.join(names[:20]) or 'nothing'}{', ...' if len(names) > 20 else ''}"


def _from_hub(name: str) -> datasets.DatasetDict:
    """A data set of the Hugging Face Hub, 'name' or 'name:config'. Without a network, only what its cache holds."""
    import datasets
    from datasets import config as hub

    datasets.disable_progress_bars()
    path, _, config = name.partition(":")
    offline = hub.HF_HUB_OFFLINE
    hub.HF_HUB_OFFLINE = offline or not reachable()
    try:
        return datasets.load_dataset(path, config or None)
    except Exception as error:  # the Hub's client raises many kinds; each is told, none is hidden
        reason = f"{type(error).__name__}: {(str(error).splitlines() or ['no reason given'])[0]}"
        raise DataError(
            f"'{name}' is no local file or folder, and the Hugging Face Hub did not give it ({reason}). Data is the packaged "
            f"{', '.join(PACKAGED)}, a folder or file, or a Hub name, with its config where it has several ('name:config'); "
            f"{_nearby(Path(name))}"
        ) from error
    finally:
        hub.HF_HUB_OFFLINE = offline


def _of_splits(splits: datasets.DatasetDict, where: str) -> tuple[dict[Split, Table], list[str]]:
    if len(splits) == 1:
        return {"train": _of_dataset(next(iter(splits.values())))}, []
    chosen, unused = match_splits([str(name) for name in splits], where)
    notes = [f"splits not used: {', '.join(unused)}"] if unused else []
    return {split: _of_dataset(splits[names[0]]) for split, names in chosen.items()}, notes


def _of_dataset(rows: datasets.Dataset) -> Table:
    import datasets

    inner = {name: kind.feature if isinstance(kind, datasets.List) else kind for name, kind in rows.features.items()}
    names = {name: list(kind.names) for name, kind in inner.items() if isinstance(kind, datasets.ClassLabel)}
    return Table(_decoded(rows.with_format("arrow")[:]), names, np.zeros(0, np.int64))


def _of_table(table: pa.Table) -> Table:
    return Table(_decoded(table), class_names(table.schema), np.zeros(0, np.int64))


def _decoded(table: pa.Table) -> pa.Table:
    """Texts as texts, however Arrow holds them: as numbers of a dictionary (pandas' categories), or as views."""
    for i, field in enumerate(table.schema):
        if (kind := _plain(field.type)) != field.type:
            table = table.set_column(i, field.name, table.column(i).cast(kind))
    return table


def _plain(kind: pa.DataType) -> pa.DataType:
    """The type without dictionaries and views."""
    if pa.types.is_dictionary(kind):
        return _plain(kind.value_type)
    if pa.types.is_string_view(kind):
        return pa.string()
    if pa.types.is_list(kind):
        return pa.list_(_plain(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_plain(field.type)) for field in kind])
    return kind
