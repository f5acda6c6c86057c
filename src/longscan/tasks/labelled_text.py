"""Texts with classes, or pairs of texts with one, from files: folders of a class each, JSON lines, TSV, or the Hub."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from longscan.errors import DataError
from longscan.tasks.hub import HUB, from_hub

#: In packed texts: what follows their end.
PADDING = 0

#: The texts (one, or a pair) and the class.
Row = tuple[tuple[bytes, ...], int]


def pack(rows: Iterable[Row], texts: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows as arrays: (count, texts * length) uint8, each text cut to ``length`` bytes or filled up with
    :data:`PADDING`, and classes (count,) int64. A zero byte within a text becomes a space, an empty text one space."""
    packed, classes = [], []
    for parts, label in rows:
        row = np.zeros((texts, length), np.uint8)
        for place, text in zip(row, parts, strict=True):
            content = text[:length].replace(b"\0", b" ") or b" "
            place[: len(content)] = np.frombuffer(content, np.uint8)
        packed.append(row.reshape(-1))
        classes.append(label)
    return np.array(packed, np.uint8).reshape(-1, texts * length), np.array(classes, np.int64)


def read_rows(data: str, part: str, columns: tuple[str, ...], tsv_columns: tuple[int, ...]) -> Iterator[Row]:
    """The rows of a part of what ``data`` names, see :class:`longscan.tasks.byte_text.ByteText`.

    Args:
        data: where it is.
        part: "train" or "test".
        columns: names of the texts, in JSON lines and on the Hub; the class is in "label".
        tsv_columns: numbers of the texts' columns in TSV files; the class is in the first.

    Raises:
        DataError: there is nothing there, or a row is not as it should be.
    """
    if data.startswith(HUB):
        return iter(from_hub(data, part, lambda rows: [_row(row, columns) for row in rows]))
    folder = Path(data).expanduser()
    for pattern, read in (
        (f"*{part}.tsv", lambda path: _tsv(path, tsv_columns)),
        (f"*{part}.jsonl", lambda path: _json_lines(path, columns)),
    ):
        found = sorted(folder.glob(pattern))
        if len(found) > 1:
            raise DataError(f"data: {folder} has several files {pattern}: {', '.join(path.name for path in found)}")
        if found:
            return read(found[0])
    # The reviews' own layout; unsup/ holds those without a class.
    classes = [path for path in sorted((folder / part).glob("*")) if path.is_dir() and path.name != "unsup"]
    if classes and len(columns) == 1:
        return _folders(classes)
    raise DataError(
        f"data: {data!r} has no {part} part; give a folder with {part}.tsv, {part}.jsonl"
        f"{f' or a folder {part}/ with one of text files for each class' if len(columns) == 1 else ''}, or {HUB}NAME"
    )


def _folders(folders: list[Path]) -> Iterator[Row]:
    for label, folder in enumerate(folders):
        for path in sorted(folder.glob("*.txt")):
            yield (_content(path),), label


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"data: cannot read {path}: {error.strerror or error}") from error


def _lines(path: Path, parse: Callable[[bytes], Row]) -> Iterator[Row]:
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    yield parse(line.rstrip(b"\r\n"))
                except (IndexError, KeyError, TypeError, ValueError, AttributeError) as error:
                    raise DataError(f"data: {path}, line {number} is not as it should be: {error!r}") from error
    except OSError as error:
        raise DataError(f"data: cannot read {path}: {error.strerror or error}") from error


def _tsv(path: Path, columns: tuple[int, ...]) -> Iterator[Row]:
    def parse(line: bytes) -> Row:
        cells = line.split(b"\t")
        return tuple(cells[column] for column in columns), int(float(cells[0]))

    return _lines(path, parse)


def _json_lines(path: Path, columns: tuple[str, ...]) -> Iterator[Row]:
    return _lines(path, lambda line: _row(json.loads(line), columns))


def _row(row: Any, columns: tuple[str, ...]) -> Row:
    return tuple(row[column].encode("utf-8", errors="replace") for column in columns), int(row["label"])
