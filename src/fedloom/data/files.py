"""Local files and folders as Arrow tables: Parquet, CSV, TSV, JSON, JSON lines.

Everything is read into memory at once: no cache that could go stale when a file changes under its name, no network, no
progress bar.
Cells of CSV and TSV files are strings; nothing is guessed to be a number or a missing value here.
Knows nothing of labels or tasks, only which file is which split.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fedloom.data.tasks import SPLITS, DataError, Split

SUFFIXES = (".parquet", ".csv", ".tsv", ".jsonl", ".ndjson", ".json")

DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json")
"""What the ``datasets`` library writes of a data set, and is none."""

ALIASES: dict[str, Split] = {
    "train": "train", "training": "train",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation", "development": "validation",
    "eval": "validation", "evaluation": "validation", "validation_matched": "validation",
    "test": "test", "testing": "test", "test_matched": "test",
}  # fmt: skip
"""Names a split goes by. The ``_matched`` ones are MNLI's, whose other halves are not used."""


def split_of(name: str) -> tuple[Split, bool] | None:
    """The split a file or split name stands for, and whether that is its whole name (``train`` against ``my_train_v2``)."""
    name = re.sub(r"-\d+-of-\d+$", "", name.lower())
    if name in ALIASES:
        return ALIASES[name], True
    found: set[Split] = {ALIASES[word] for word in re.split(r"[^a-z0-9]+", name) if word in ALIASES}
    return (found.pop(), False) if len(found) == 1 else None


def match_splits(names: Sequence[str], where: str) -> tuple[dict[Split, list[str]], list[str]]:
    """Split -> the names that hold it (several only if they are numbered shards), and the names not used.

    A whole name wins over one that merely contains a split's name.

    Raises:
        DataError: two names claim one split.
    """
    chosen: dict[Split, list[str]] = {}
    for split in SPLITS:
        claims = [(name, found[1]) for name in names if (found := split_of(name)) and found[0] == split]
        claimed = [name for name, whole in claims if whole] or [name for name, _ in claims]
        if len(claimed) > 1 and len({re.sub(r"-\d+-of-\d+$", "", name) for name in claimed}) > 1:
            raise DataError(f"{where} has more than one {split} split: {', '.join(claimed)}; leave only the one to use")
        if claimed:
            chosen[split] = claimed
    used = {name for claimed in chosen.values() for name in claimed}
    return chosen, [name for name in names if name not in used]


def read_folder(folder: Path) -> tuple[dict[Split, pa.Table], list[str]]:
    """The tables of a folder's splits, and notes. A single file, whatever its name, is all there is: the training split.

    Raises:
        DataError: no data file, no training file, or a file that cannot be read.
    """
    there = (path for path in folder.iterdir() if path.is_file() and path.name not in DESCRIPTIONS)
    files = sorted(path for path in there if path.suffix.lower() in SUFFIXES)
    if not files and (folder / "data").is_dir():
        return read_folder(folder / "data")
    if not files:
        listed = ", ".join(sorted(path.name for path in folder.iterdir())[:20]) or "nothing"
        raise DataError(f"the folder '{folder}' has no data file ({', '.join(SUFFIXES)}); it has: {listed}")
    if len(files) == 1:
        found = split_of(files[0].stem)
        held_out = found is not None and found[0] != "train"
        return {"train": read_file(files[0])}, [f"the only file, {files[0].name}, is the training data"] if held_out else []
    stems: dict[str, Path] = {}
    for path in files:
        if split_of(path.stem) and path.stem in stems:
            both = f"{stems[path.stem].name} and {path.name}"
            raise DataError(f"the folder '{folder}' has both {both}; leave only the one to use")
        stems[path.stem] = path
    chosen, unused = match_splits(list(stems), f"the folder '{folder}'")
    if "train" not in chosen:
        listed = ", ".join(path.name for path in files)
        raise DataError(f"the folder '{folder}' has no training file; call it train.csv (or .parquet, ...); it has: {listed}")
    tables: dict[Split, pa.Table] = {split: _join([stems[name] for name in names]) for split, names in chosen.items()}
    return tables, [f"not used: {', '.join(stems[name].name for name in unused)}"] if unused else []


def _join(paths: Sequence[Path]) -> pa.Table:
    """The shards of one split, one after another."""
    tables = [read_file(path) for path in paths]
    for path, table in zip(paths, tables, strict=True):
        if table.schema != tables[0].schema:
            columns, others = ", ".join(map(str, table.schema.names)), ", ".join(map(str, tables[0].schema.names))
            raise DataError(f"'{path}' and '{paths[0].name}' do not have the same columns and types: {columns} against {others}")
    return pa.concat_tables(tables)


def read_file(path: Path) -> pa.Table:
    """One file as a table, by its suffix.

    Raises:
        DataError: an unknown suffix, a file that is not what its suffix says, or text that is not UTF-8.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise DataError(f"cannot tell what '{path}' holds from its name; data files end in {', '.join(SUFFIXES)}")
    if suffix == ".parquet":
        try:
            return pq.ParquetFile(io.BytesIO(path.read_bytes())).read()  # read_table would load pandas: a third of a second
        except (pa.ArrowInvalid, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # the file's, and not what is in it
            raise DataError(f"'{path}' is not a readable Parquet file: {error}") from error
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"'{path}' is not UTF-8: byte {error.object[error.start]:#04x} at offset {error.start} is not valid there. "
            f"Convert it, for example with: iconv -f WINDOWS-1252 -t UTF-8 '{path.name}' > 'utf8_{path.name}' "
            "(put its real encoding after -f)",
            f"a file that is not UTF-8, at offset {error.start}",
        ) from error
    columns = _cells(text, path) if suffix in (".csv", ".tsv") else _records(text, path, lines=suffix != ".json")
    return pa.table({name: _array(values, name, path) for name, values in columns.items()})


def _cells(text: str, path: Path) -> dict[str, list[Any]]:
    """The columns of a CSV or TSV text with a header line.

    A TSV that is not well formed with quotes (quotes inside plain text, as in GLUE's files) is read without quoting.
    """
    first = re.sub(r'"[^"]*"', "", text.split("\n", 1)[0])  # what is within quotes parts no cells
    tabs = path.suffix.lower() == ".tsv"
    delimiter = "\t" if tabs else next((mark for mark in ",;\t" if mark in first), ",")
    limit = csv.field_size_limit(max(len(text), 1))
    try:
        try:
            return _table(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True), path)
        except (csv.Error, DataError):
            if not tabs:
                raise
        return _table(csv.reader(io.StringIO(text, newline=""), delimiter="\t", quoting=csv.QUOTE_NONE), path)
    except csv.Error as error:
        mend = "quote cells that hold quotes, commas or line breaks"
        raise DataError(f"'{path}' is not well-formed CSV: {error}; {mend}") from error
    finally:
        csv.field_size_limit(limit)


def _table(reader: Any, path: Path) -> dict[str, list[Any]]:
    """The columns of what a csv.reader yields; empty lines are skipped."""
    header = next(reader, [])
    if not header or len(set(header)) < len(header):
        raise DataError(
            f"the first line of '{path}' must name each column once; it is: {header}", "the first line does not name each column once"
        )
    rows = []
    for row in reader:
        if row and len(row) != len(header):
            named = f"the first line names {len(header)}: {', '.join(header)}"
            raise DataError(
                f"line {reader.line_num} of '{path}' has {len(row)} cells, and {named}",
                f"line {reader.line_num} has {len(row)} cells, and the first {len(header)}",
            )
        rows += [row] if row else []
    return {name: [row[i] for row in rows] for i, name in enumerate(header)}


def _records(text: str, path: Path, lines: bool) -> dict[str, list[Any]]:
    """The columns of JSON: an object a line, a list of objects, an object of equal lists, or one of these under "data"."""
    try:
        whole = None if lines else json.loads(text, parse_constant=_constant)
    except json.JSONDecodeError as error:
        whole = _lines(text, path, error)  # a .json file may still hold one object a line
    if isinstance(whole, dict) and isinstance(whole.get("data"), (list, dict)) and len(whole) == 1:
        whole = whole["data"]
    _insist_on_rows(whole, path)
    if isinstance(whole, dict) and whole and all(isinstance(v, list) for v in whole.values()):
        if len({len(values) for values in whole.values()}) > 1:
            raise DataError(f"the columns of '{path}' differ in length: { {name: len(v) for name, v in whole.items()} }")
        return whole
    records: list[Any] = whole if isinstance(whole, list) else _lines(text, path) if lines else [whole]
    for number, record in enumerate(records):
        if not isinstance(record, dict):
            raise DataError(
                f"record {number} of '{path}' is {json.dumps(record)[:60]}; each must be an object of columns",
                f"record {number} is no object of columns",
            )
    names = dict.fromkeys(name for record in records for name in record)
    return {name: [record.get(name) for record in records] for name in names}


def _insist_on_rows(whole: Any, path: Path) -> None:
    """Insist that JSON is not nested as SQuAD's authors have it, article by article."""
    articles = whole.get("data") if isinstance(whole, dict) else whole
    if isinstance(articles, list) and articles and isinstance(articles[0], dict) and isinstance(articles[0].get("paragraphs"), list):
        raise DataError(
            f"'{path}' is nested by articles and paragraphs, as SQuAD's authors have it, and that is not read; write a question a line: "
            '{"title": …, "context": …, "question": …, "answers": {"text": […], "answer_start": […]}}, as the Hub\'s "squad" has it',
            "a file that is nested by articles and paragraphs",
        )


def _lines(text: str, path: Path, otherwise: json.JSONDecodeError | None = None) -> list[Any]:
    """One JSON value for each line that is not blank. ``otherwise``: what is wrong with the text as one value, which is told where not even
    the first line is one."""
    records: list[Any] = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                records.append(json.loads(line, parse_constant=_constant))
            except json.JSONDecodeError as error:
                if otherwise is not None and not records:
                    at = f"{otherwise.msg} in line {otherwise.lineno}, column {otherwise.colno}"
                    there = text.split("\n")[otherwise.lineno - 1].strip()[:60]
                    raise DataError(f"'{path}' is not JSON: {at}: {there}", f"line {otherwise.lineno} is not JSON") from error
                raise DataError(
                    f"line {number} of '{path}' is not JSON: {error.msg}; it begins: {line[:60]}", f"line {number} is not JSON"
                ) from error
    return records


def _constant(name: str) -> float | None:
    """What JSON has no word for and Python writes all the same: NaN, where nothing is."""
    return None if name == "NaN" else float(name)


def _array(values: list[Any], name: str, path: Path) -> pa.Array:
    """One column; values of mixed types, and numbers too large for 64 bits, become their JSON text.

    Raises:
        DataError: text that is half a character.
    """
    if _halved(name):
        raise DataError(
            f"a column's name in '{path}' holds half a character: {name!r}; write it whole", "a column's name is half a character"
        )
    try:
        try:
            return pa.array(values)
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
            return pa.array([v if v is None or isinstance(v, str) else json.dumps(v) for v in values])
    except UnicodeEncodeError as error:
        row = next(i for i, v in enumerate(values) if _halved(v))
        raise DataError(
            f"column '{name}' of '{path}' holds half a character in row {row} (counted from 0): {error.object[error.start]!r}, as a cut "
            "emoji leaves it; write it whole or take it out",
            f"row {row} holds half a character",
        ) from error


def _halved(value: Any) -> bool:
    """Whether there is half a character in a text, or in one within lists and objects."""
    if isinstance(value, dict):
        return any(_halved(part) for pair in value.items() for part in pair)
    if isinstance(value, list):
        return any(map(_halved, value))
    return isinstance(value, str) and value != value.encode("utf-8", "ignore").decode("utf-8")
