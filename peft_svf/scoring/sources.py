"""Rows of a file, of a folder of files, or of a dataset of the Hub, by split.

JSON and CSV files are not read by `datasets.load_dataset`, which changes values silently: a CSV answer `007` becomes
7.0 and `NA` becomes None, a JSON answer "7" becomes 7 and "2024-01-01" a datetime.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..utils.extras import needs
from ..utils.files import read_text

FILES = (".jsonl", ".json", ".csv", ".parquet")
ALL = "all"  # the split of all rows
# As in `datasets`: words of a path that name the split of a file.
_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
}
_ORDER = ("train", "validation", "test")
_SAVED = ("dataset_dict.json", "state.json")  # in a folder that `save_to_disk` wrote


def place_and_split(source: str) -> tuple[str, str | None]:
    """Return both parts of `PLACE:SPLIT`; the split is `None` if there is none, or if a file has this whole name."""
    found = re.fullmatch(r"(.+):([\w.-]+(?:\[[^]]*\])?)", source)
    return (source, None) if not found or Path(source).exists() else (found[1], found[2])


def is_file(place: str) -> bool:
    """Whether a place is a file by its name, or one that exists."""
    return Path(place).suffix in FILES or Path(place).is_file()


def is_data(source: str) -> bool:
    """Whether a text names a file or a folder, with or without a split."""
    place, _ = place_and_split(source)
    return is_file(place) or Path(place).is_dir()


def read_splits(place: str, *, config: str | None = None, streaming: bool = False) -> Mapping[str, Any]:
    """
    Return the rows of each split.

    Args:
        place (`str`): A file, which is one split `"train"`; a folder, whose files are named after their splits; or the
            name of a dataset on the Hub.
        config (`str`, *optional*): Configuration of a dataset.
        streaming (`bool`): Let `datasets` read, without loading everything.

    Returns:
        Lists of dicts for files that are read here, otherwise datasets of the package `datasets`.

    Raises:
        ValueError: A file is malformed, or its kind is unknown; the message names file and line.
        OSError: The file cannot be read, or there is no such dataset.
        ImportError: A package that reads it is not installed.
    """
    path = Path(place)
    if is_file(place) and not streaming:
        if path.suffix not in FILES:
            raise ValueError(f"{place} must be a {', '.join(FILES)} file, a folder, or a dataset of the Hub.")
        if config is not None:
            raise ValueError(f"{place} is a file, which has no configurations. Leave the configuration out.")
        return {"train": list(_read(path))}
    if path.is_dir() and not streaming and config is None:
        if any((path / name).is_file() for name in _SAVED):
            loaded = _datasets(place).load_from_disk(place)
            return loaded if isinstance(loaded, Mapping) else {"train": loaded}
        card = path / "README.md"
        if not (card.is_file() and "configs:" in read_text(card)) and (splits := _files_by_split(path)):
            return {split: [row for file in files for row in _read(file)] for split, files in splits.items()}
    loaded = _datasets(place).load_dataset(place, name=config, streaming=streaming)
    return dict(loaded.items())


def _datasets(place: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise needs("train", f"{place!r} is not a {', '.join(FILES)} file. Loading it", "datasets") from error
    return datasets


def _files_by_split(folder: Path) -> dict[str, list[Path]]:
    """Return the data files of a folder. If names of some files tell their split, others are left out."""
    splits: dict[str, list[Path]] = {}
    for file in sorted(folder.rglob("*")):
        inner = file.relative_to(folder)
        hidden = any(part.startswith(".") for part in inner.parts)
        if file.suffix not in FILES or hidden or file.name.startswith("dataset_info"):
            continue
        words = re.split(r"[^a-z]+", inner.with_suffix("").as_posix().lower())
        splits.setdefault(next((_WORDS[word] for word in words if word in _WORDS), ""), []).append(file)
    rest = splits.pop("", [])
    return dict(sorted(splits.items(), key=lambda item: _ORDER.index(item[0]))) or ({"train": rest} if rest else {})


def _read(path: Path) -> Iterable[Any]:
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    if path.suffix == ".parquet":
        yield from _parquet(path)
        return
    yield from rows_of_text(read_text(path), path.suffix, str(path))


def rows_of_text(text: str, suffix: str, place: str) -> Iterator[Any]:
    """
    Yield the rows of the content of a file.

    Args:
        text (`str`): The content.
        suffix (`str`): The kind of file: `.csv`, `.tsv` (separated by tabs), `.json` or `.jsonl`.
        place (`str`): What messages call it.

    Raises:
        ValueError: The text is malformed; the message names `place` and the line.
    """
    if suffix in (".csv", ".tsv"):
        yield from _csv(text, place, "," if suffix == ".csv" else "\t")
    elif suffix == ".json":
        content = _parsed(text, place)
        if not isinstance(content, list):
            raise ValueError(f"{place} must hold a list of examples, got {type(content).__name__}.")
        yield from content
    else:
        # not by splitlines, which also splits at separators that JSON allows within its strings
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                yield _parsed(line, f"{place}, line {number}")


def _parquet(path: Path) -> list[dict[str, Any]]:
    try:
        from pyarrow import ArrowInvalid, parquet
    except ImportError as error:
        raise needs("train", f"Reading {path}", "pyarrow") from error
    try:
        rows: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
    except ArrowInvalid as error:
        raise ValueError(f"{path} is not a valid parquet file: {error}.") from error
    return rows


def _csv(text: str, place: str, delimiter: str) -> Iterator[dict[str, Any]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter)
    try:
        header = next(reader, [])
        for fields in reader:
            if fields and len(fields) != len(header):
                raise ValueError(
                    f"{place}, line {reader.line_num} has {len(fields)} fields, its header {len(header)}: {fields}."
                )
            if fields:
                yield dict(zip(header, fields, strict=True))
    except csv.Error as error:
        raise ValueError(f"{place}, line {reader.line_num} is not valid CSV: {error}.") from error


def _parsed(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place} is not valid JSON: {error}.") from error
