"""A corpus on disk: tokens of a training and a held-out part as memory-mapped files, built once per content."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from longscan.errors import DataError, StorageError
from longscan.nn.storage import write_text
from longscan.tasks.sources import Document, Source, pieces, split_in_two
from longscan.tasks.tokenizers import Tokenizer

_FORMAT = 1
_DESCRIPTION = "corpus.json"


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Text as tokens, in two parts that share no document.

    Each document is preceded by the tokenizer's border token. Training documents lie in an order drawn from the hashes
    of their names, so that neighbours are unrelated; held-out documents lie in the source's order.

    Attributes:
        key: hash of all that went in; equal keys mean equal tokens.
        label: where the text came from, in words.
        train: (tokens,) memory-mapped unsigned integers.
        held_out: the same for the held-out part.
        train_bytes, held_out_bytes: bytes of text the tokens stand for (borders are no text).
        train_documents, held_out_documents: number of documents.
        folder: where it is kept.
    """

    key: str
    label: str
    train: np.ndarray
    held_out: np.ndarray
    train_bytes: int
    held_out_bytes: int
    train_documents: int
    held_out_documents: int
    folder: Path

    def held_out_text(self) -> bytes:
        """The held-out documents, one after the other: what a compressor is given."""
        return (self.folder / "held_out.txt").read_bytes()

    def describe(self) -> dict[str, Any]:
        """What a run writes down about its data."""
        return {
            "key": self.key,
            "label": self.label,
            "train_tokens": len(self.train),
            "train_bytes": self.train_bytes,
            "train_documents": self.train_documents,
            "held_out_tokens": len(self.held_out),
            "held_out_bytes": self.held_out_bytes,
            "held_out_documents": self.held_out_documents,
        }


def cache_folder() -> Path:
    """Where corpora are kept: ``$LONGSCAN_CACHE``, else ``longscan`` in ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    own = os.environ.get("LONGSCAN_CACHE")
    if own:
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "longscan"


def build_corpus(source: Source, tokenizer: Tokenizer, *, held_out: float, cache: Path | None = None) -> Corpus:
    """The corpus of a source, from the cache if the same one was built before.

    A document is held out if the hash of its name falls in the lowest ``held_out`` part; a document with the contents
    of an earlier one is left out. A source of one text is cut in two: its end is held out.

    Args:
        source: the documents.
        tokenizer: what turns them into tokens.
        held_out: fraction of documents to hold out, 0 < held_out <= 1; 1 keeps everything as held-out.
        cache: folder of built corpora (default: :func:`cache_folder`).

    Raises:
        DataError: the source cannot be read, or a part would be empty.
        StorageError: the cache cannot be written.
    """
    if not 0 < held_out <= 1:
        raise DataError(f"held_out must be a fraction above 0 and at most 1, got {held_out}")
    cache = cache_folder() if cache is None else cache
    key = _key(source, tokenizer, held_out)
    folder = cache / "corpora" / key
    if not (folder / _DESCRIPTION).is_file():
        _build(folder, key, source, tokenizer, held_out)
    return _open(folder, key)


def _key(source: Source, tokenizer: Tokenizer, held_out: float) -> str:
    digest = hashlib.sha256(json.dumps([_FORMAT, tokenizer.identity, held_out, source.single]).encode())
    if source.identity is not None:
        digest.update(source.identity.encode())
    else:
        for name, content in source.documents():
            digest.update(hashlib.sha256(name.encode("utf-8", errors="surrogateescape")).digest())
            digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()[:32]


def _place(name: str) -> float:
    """A number in [0, 1) that depends on the name alone."""
    digest = hashlib.sha256(name.encode("utf-8", errors="surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _split(source: Source, held_out: float) -> Iterator[tuple[bool, Document]]:
    """(is held out, document) for every distinct, non-empty document."""
    if source.single and held_out < 1:
        for document in source.documents():
            train, rest = split_in_two(document, held_out)
            yield False, (document[0], train)
            yield True, (document[0], rest)
        return
    seen = set()
    for name, content in source.documents():
        digest = hashlib.sha256(content).digest()
        if content and digest not in seen:
            seen.add(digest)
            yield held_out == 1 or _place(name) < held_out, (name, content)


def _build(folder: Path, key: str, source: Source, tokenizer: Tokenizer, held_out: float) -> None:
    """Write a corpus into a temporary folder beside its place, then move it there in one step."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=f".{key}.", dir=folder.parent))
    except OSError as error:
        raise StorageError(
            f"cannot write the corpus to {folder}: {error}; LONGSCAN_CACHE names another place"
        ) from error
    try:
        parts = _write(building, source, tokenizer, held_out)
        empty = "held-out" if not parts["held_out_documents"] else "training" if not parts["train_documents"] else None
        if empty and (held_out < 1 or empty == "held-out"):
            raise DataError(
                f"data: {source.label} leaves the {empty} part empty "
                f"({parts['train_bytes'] + parts['held_out_bytes']} bytes in all, held_out={held_out}); "
                "give more text or more documents, or another fraction"
            )
        write_text(building / _DESCRIPTION, json.dumps({"format": _FORMAT, "label": source.label, **parts}, indent=2))
        try:
            os.rename(building, folder)
        except OSError:
            # Another process has just built the same corpus.
            if not (folder / _DESCRIPTION).is_file():
                raise
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(
            f"cannot write the corpus to {folder}: {error}; LONGSCAN_CACHE names another place"
        ) from error
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _write(folder: Path, source: Source, tokenizer: Tokenizer, held_out: float) -> dict[str, Any]:
    dtype = np.min_scalar_type(tokenizer.vocab_size - 1)
    written = {part: _Part() for part in ("train", "held_out")}
    unordered = folder / "unordered.bin"
    order: list[tuple[float, int, int]] = []  # (place, first token, tokens) of each training document
    with (
        open(unordered, "wb") as train,
        open(folder / "held_out.bin", "wb") as rest,
        open(folder / "held_out.txt", "wb") as text,
    ):
        for is_held_out, (name, content) in _split(source, held_out):
            part = written["held_out" if is_held_out else "train"]
            start = part.tokens
            for piece in pieces(content):
                tokens = tokenizer.encode(piece).astype(dtype)
                if piece is content or part.tokens == start:
                    tokens = np.concatenate([np.array([tokenizer.border], dtype), tokens])
                tokens.tofile(rest if is_held_out else train)
                part.tokens += len(tokens)
                part.bytes += tokenizer.byte_length(piece)
                if is_held_out:
                    text.write(piece)
            part.documents += 1 if content else 0
            if not is_held_out:
                order.append((_place(name), start, part.tokens - start))
    with open(folder / "train.bin", "wb") as file:
        if written["train"].tokens:
            tokens = np.memmap(unordered, dtype=dtype, mode="r")
            for _, start, count in sorted(order):
                tokens[start : start + count].tofile(file)
            del tokens
    unordered.unlink()
    description: dict[str, Any] = {"dtype": dtype.name}
    for name, part in written.items():
        description |= {f"{name}_{key}": value for key, value in dataclasses.asdict(part).items()}
    return description


@dataclasses.dataclass
class _Part:
    tokens: int = 0
    bytes: int = 0
    documents: int = 0


def _open(folder: Path, key: str) -> Corpus:
    try:
        about = json.loads((folder / _DESCRIPTION).read_text(encoding="utf-8"))
        arrays = {}
        for part in ("train", "held_out"):
            count, path = about[f"{part}_tokens"], folder / f"{part}.bin"
            arrays[part] = np.memmap(path, dtype=about["dtype"], mode="r") if count else np.empty(0, about["dtype"])
            if len(arrays[part]) != count:
                raise ValueError(f"{path.name} holds {len(arrays[part])} tokens, {count} were written")
        return Corpus(
            key=key,
            label=about["label"],
            folder=folder,
            train=arrays["train"],
            held_out=arrays["held_out"],
            train_bytes=about["train_bytes"],
            held_out_bytes=about["held_out_bytes"],
            train_documents=about["train_documents"],
            held_out_documents=about["held_out_documents"],
        )
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"the cached corpus {folder} is damaged ({error}); delete that folder, it is built again"
        ) from error
