"""Where text comes from: documents of a file, a folder, JSON lines, the standard library or the Hub."""

from __future__ import annotations

import dataclasses
import json
import mmap
import os
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

from longscan.errors import DataError

#: Text: bytes, or those of a large file mapped into memory.
Content = bytes | mmap.mmap

#: A document: a name that is the same on every machine, and its text.
Document = tuple[str, Content]

STDLIB = "stdlib"
_HUB_PREFIX = "hf:"
# Folders of other people's packages, of caches and of version control: never part of a corpus.
_SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__", "node_modules"})
_PIECE = 1 << 20
# Files from this size on are mapped, smaller ones read.
_LARGE = 1 << 26


@dataclasses.dataclass(frozen=True)
class Source:
    """Documents that can be gone through any number of times, in the same order each time.

    Args:
        label: what a person reads ("the standard library of Python 3.12").
        documents: starts one pass.
        identity: a fixed description, if the contents need not be read to know them (a data set of the Hub); None means
            that the contents themselves are the identity.
        single: one text only, to be split by position instead of by document.
    """

    label: str
    documents: Callable[[], Iterator[Document]]
    identity: str | None = None
    single: bool = False


def open_source(data: str, *, field: str = "text", max_bytes: int | None = None) -> Source:
    """The source that ``data`` names.

    Args:
        data: ``"stdlib"``, a path (text file, folder, ``.jsonl``), or ``"hf:NAME"``, ``"hf:NAME:CONFIG"``.
        field: the field of a JSON line or data-set row that holds the text.
        max_bytes: stop after this many bytes of text.

    Raises:
        DataError: there is nothing there, or it needs a package that is not installed.
    """
    if data == STDLIB:
        source = _standard_library()
    elif data.startswith(_HUB_PREFIX):
        source = _hub(data[len(_HUB_PREFIX) :], field, max_bytes)
    else:
        path = Path(data).expanduser()
        if path.is_dir():
            source = Source(f"the folder {path}", lambda: _folder(path, field))
        elif path.suffix == ".jsonl" and path.is_file():
            source = Source(f"the JSON lines of {path}", lambda: _json_lines(path, path.name, field))
        elif path.is_file():
            source = Source(f"the file {path}", lambda: iter([(path.name, _read(path))]), single=True)
        else:
            raise DataError(
                f"data: {data!r} is neither a file nor a folder; give a text file, a folder, a .jsonl file, "
                f"{_HUB_PREFIX}NAME for a data set of the Hugging Face Hub, or {STDLIB!r}"
            )
    if max_bytes is None:
        return source
    if max_bytes < 1:
        raise DataError(f"max_bytes must be at least 1, got {max_bytes}")
    documents = source.documents
    return dataclasses.replace(source, documents=lambda: _first_bytes(documents(), max_bytes))


def _standard_library() -> Source:
    """The Python files of the running interpreter's standard library, its own tests included, other packages not."""
    root = Path(sysconfig.get_paths()["stdlib"])

    def documents() -> Iterator[Document]:
        for path in _files(root):
            # Build settings of one machine (_sysconfigdata_...) are no text that every machine has.
            if path.suffix == ".py" and not path.name.startswith("_sysconfigdata"):
                yield path.relative_to(root).as_posix(), _read(path)

    version = sysconfig.get_python_version()
    return Source(f"the standard library of Python {version}", documents)


def _folder(root: Path, field: str) -> Iterator[Document]:
    for path in _files(root):
        name = path.relative_to(root).as_posix()
        if path.suffix == ".jsonl":
            yield from _json_lines(path, name, field)
            continue
        content = _read(path)
        if content.find(b"\0") < 0:  # a NUL byte: not text
            yield name, content


def _files(root: Path) -> Iterator[Path]:
    """Every plain file below a folder in sorted order, hidden ones and skipped folders left out."""

    def refuse(error: OSError) -> None:
        raise DataError(f"data: cannot read the folder {error.filename}: {error.strerror}") from error

    for folder, subfolders, names in os.walk(root, onerror=refuse):
        subfolders[:] = sorted(name for name in subfolders if name not in _SKIPPED_FOLDERS and name[0] != ".")
        for name in sorted(names):
            path = Path(folder, name)
            if name[0] != "." and path.is_file():
                yield path


def _read(path: Path) -> Content:
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size < _LARGE:
                return file.read()
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise DataError(f"data: cannot read {path}: {error.strerror or error}") from error


def _json_lines(path: Path, name: str, field: str) -> Iterator[Document]:
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{name}:{number}", _text_of(_parse(line, path, number), field, f"{path}, line {number}")
    except OSError as error:
        raise DataError(f"data: cannot read {path}: {error.strerror or error}") from error


def _parse(line: bytes, path: Path, number: int) -> object:
    try:
        return json.loads(line)
    except ValueError as error:
        raise DataError(f"data: {path}, line {number} is not JSON: {error}") from error


def _text_of(row: object, field: str, place: str) -> bytes:
    text = row.get(field) if isinstance(row, dict) else None
    if not isinstance(text, str):
        fields = f"fields: {', '.join(map(str, row))}" if isinstance(row, dict) else f"a {type(row).__name__}"
        raise DataError(f"data: {place} has no text in field {field!r} ({fields}); name another one with --field")
    return text.encode("utf-8", errors="replace")


def _hub(name: str, field: str, max_bytes: int | None) -> Source:
    name, _, config = name.partition(":")
    if not name:
        raise DataError("data: hf: needs the name of a data set, for example hf:roneneldan/TinyStories")
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"data: {_HUB_PREFIX}{name} needs the package `datasets`; install it with: pip install 'longscan[hub]'"
        ) from error

    def documents() -> Iterator[Document]:
        try:
            rows = datasets.load_dataset(name, config or None, split="train", streaming=True)
            for number, row in enumerate(rows):
                yield f"{number}", _text_of(row, field, f"{name}, row {number}")
        except DataError:
            raise
        except Exception as error:  # datasets raises errors of many kinds: connection, parsing, unknown names
            raise DataError(f"data: cannot read the data set {name!r}: {error}") from error

    return Source(f"the data set {name}", documents, identity=f"{_HUB_PREFIX}{name}:{config}:{field}:{max_bytes}")


def _first_bytes(documents: Iterator[Document], max_bytes: int) -> Iterator[Document]:
    left = max_bytes
    for name, content in documents:
        yield name, content if len(content) <= left else content[:left]
        left -= len(content)
        if left <= 0:
            return


def last_part(content: Content, fraction: float) -> int:
    """Where the last ``fraction`` of a text begins: at the line that begins nearest before there."""
    cut = len(content) - round(len(content) * fraction)
    line = content.rfind(b"\n", 0, cut) + 1
    return line if line > cut // 2 else cut


def pieces(content: Content, start: int, end: int) -> Iterator[bytes]:
    """A stretch of a text in pieces that end with a line, so that tokenizing one never needs all of it."""
    while end - start > _PIECE:
        line = content.rfind(b"\n", start, start + _PIECE) + 1
        stop = line if line > start else start + _PIECE
        yield content[start:stop]
        start = stop
    if end > start:
        yield content[start:end]
