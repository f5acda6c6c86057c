"""A corpus on disk: tokens of a training and a held-out part in shards mapped into memory, built once per content.

Its folder holds ``manifest.json`` (tokenizer, dtype, counts, the SHA-256 of each file), ``train-00000.bin`` and so on,
``held_out-00000.bin``, ``held_out.txt``, and the tokenizer if it is a file. Text is read as a stream; what is held of
it grows by about 150 bytes a document.
"""

from __future__ import annotations

import array
import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from longscan.errors import DataError, StorageError
from longscan.nn.storage import file_digest, flush, json_digest, write_text
from longscan.tasks.shards import ShardWriter, Tokens, read_dtype, read_shards, verify
from longscan.tasks.sources import Content, Source, last_part, pieces
from longscan.tasks.tokenizers import Tokenizer

MANIFEST = "manifest.json"

# Of what the tokens are; part of the key.
_TOKENS_FORMAT = 1
# Of how they lie in files.
_FORMAT = 2
_HELD_OUT_TEXT = "held_out.txt"
_SHARD_TOKENS = 1 << 27
# Text that is given to the tokenizer at once, for each core and at least.
_TEXT_PER_CORE, _LEAST_TEXT = 1 << 20, 1 << 22

#: Told what is done ("reading", "tokenizing", "shuffling", "checking"), how much of it, and of how much, if known.
Progress = Callable[[str, int, int | None], None]


def silent(what: str, done: int, whole: int | None) -> None:
    """Progress that nobody sees."""


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Text as tokens, in two parts that share no document.

    Each document is preceded by the tokenizer's border token. Training documents lie in an order drawn from the hashes
    of their names, so that neighbours are unrelated; held-out documents lie in the source's order.

    Attributes:
        key: hash of all that went in; equal keys mean equal tokens.
        label: where the text came from, in words.
        train: (tokens,) unsigned integers, mapped into memory shard by shard.
        held_out: the same for the held-out part, in one file.
        train_bytes, held_out_bytes: bytes of text the tokens stand for (borders are no text).
        train_documents, held_out_documents: number of documents.
        folder: where it is kept.
    """

    key: str
    label: str
    train: Tokens
    held_out: np.ndarray
    train_bytes: int
    held_out_bytes: int
    train_documents: int
    held_out_documents: int
    folder: Path

    def held_out_text(self) -> bytes:
        """The held-out documents, one after the other: what a compressor is given."""
        return (self.folder / _HELD_OUT_TEXT).read_bytes()

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


def build_corpus(
    source: Source,
    tokenizer: Tokenizer,
    *,
    held_out: float,
    cache: Path | None = None,
    out: Path | None = None,
    shard_tokens: int = _SHARD_TOKENS,
    share: tuple[int, int] = (0, 1),
    progress: Progress = silent,
) -> Corpus:
    """The corpus of a source, from the cache if the same one was built before.

    A document is held out if the hash of its name falls in the lowest ``held_out`` part; a document with the contents
    of an earlier one is left out. A source of one text is cut in two: its end is held out.

    Args:
        source: the documents.
        tokenizer: what turns them into tokens, on all cores if it can.
        held_out: fraction of documents to hold out, 0 < held_out <= 1; 1 keeps everything as held-out.
        cache: folder of built corpora (default: :func:`cache_folder`).
        out: the folder of this corpus, instead of one in the cache.
        shard_tokens: most tokens of a shard of the training part.
        share, progress: see :func:`open_corpus`.

    Raises:
        DataError: the source cannot be read, a part would be empty, a shard is damaged, or ``out`` holds something
            else.
        StorageError: the corpus cannot be written.
    """
    if not 0 < held_out <= 1:
        raise DataError(f"held_out must be a fraction above 0 and at most 1, got {held_out}")
    key = _key(source, tokenizer, held_out, progress)
    folder = (cache_folder() if cache is None else cache) / "shards" / key if out is None else out
    if not (folder / MANIFEST).is_file():
        _build(folder, key, source, tokenizer, held_out, shard_tokens, progress)
    corpus = open_corpus(folder, share=share, progress=progress)
    if corpus.key != key:
        raise DataError(f"{folder} holds the corpus of {corpus.label}, other text or tokens; name another folder")
    return corpus


def open_corpus(folder: Path, *, share: tuple[int, int] = (0, 1), progress: Progress = silent) -> Corpus:
    """A corpus that was built, after its files were compared with their checksums.

    Args:
        folder: of the corpus.
        share: (rank, size): of several processes, each compares its share of the files.
        progress: see :data:`Progress`.

    Raises:
        DataError: a file is missing, cut short or changed; the message names it.
    """
    about = read_manifest(folder)
    again = f"; delete {folder}, it is built again from the text"
    try:
        train, held_out = (Tokens(folder, about["dtype"], about[part]) for part in ("train", "held_out"))
        rank, size = share
        verify(folder, [*about["train"], *about["held_out"]][rank::size], lambda *done: progress("checking", *done))
        if rank == 0 and file_digest(folder / _HELD_OUT_TEXT) != about["held_out_text"]:
            raise DataError(f"{folder / _HELD_OUT_TEXT} is damaged: it does not match the checksum written with it")
    except DataError as error:
        raise DataError(f"{error}{again}") from error
    except OSError as error:
        raise DataError(f"{folder / _HELD_OUT_TEXT} is missing or unreadable: {error}{again}") from error
    return Corpus(
        key=about["key"],
        label=about["label"],
        folder=folder,
        train=train,
        held_out=held_out[:],
        **{name: about[name] for name in _COUNTS},
    )


_COUNTS = ("train_bytes", "held_out_bytes", "train_documents", "held_out_documents")


def read_manifest(folder: Path) -> dict[str, Any]:
    """What a corpus says of itself, with lists of :class:`Shard` under "train" and "held_out".

    Raises:
        DataError: it is missing, changed, or of another version.
    """
    path = folder / MANIFEST
    try:
        about = dict(json.loads(path.read_text(encoding="utf-8")))
        if about.pop("self") != json_digest(about):
            raise ValueError("its contents do not match the checksum written with them")
        if about["format"] != _FORMAT:
            raise ValueError(f"it has format {about['format']!r}, this version reads {_FORMAT}")
        about["dtype"] = read_dtype(about)
        for part in ("train", "held_out"):
            about[part] = read_shards(about[part])
        for name in ("key", "label", "tokenizer", "held_out_text"):
            about[name] = str(about[name])
        for name in _COUNTS:
            if type(about[name]) is not int or about[name] < 0:
                raise ValueError(f"{name} is {about[name]!r}")
        # Readers of the held-out part want it as an array.
        if len(about["held_out"]) > 1:
            raise ValueError("its held-out part is in several files")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{path} is damaged or missing: {error}; delete {folder}, it is built again") from error
    return about


def _key(source: Source, tokenizer: Tokenizer, held_out: float, progress: Progress) -> str:
    digest = hashlib.sha256(json.dumps([_TOKENS_FORMAT, tokenizer.identity, held_out, source.single]).encode())
    if source.identity is not None:
        digest.update(source.identity.encode())
    else:
        done = 0
        for name, content in source.documents():
            digest.update(hashlib.sha256(name.encode("utf-8", errors="surrogateescape")).digest())
            digest.update(hashlib.sha256(content).digest())
            done += len(content)
            progress("reading", done, None)
    return digest.hexdigest()[:32]


def _place(name: str) -> float:
    """A number in [0, 1) that depends on the name alone."""
    digest = hashlib.sha256(name.encode("utf-8", errors="surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _split(source: Source, held_out: float) -> Iterator[tuple[bool, str, Content, int, int]]:
    """(is held out, name, text, start, end) for every distinct stretch of text that is not empty."""
    if source.single and held_out < 1:
        for name, content in source.documents():
            cut = last_part(content, held_out)
            for is_held_out, start, end in ((False, 0, cut), (True, cut, len(content))):
                if start < end:
                    yield is_held_out, name, content, start, end
        return
    seen = set()
    for name, content in source.documents():
        digest = hashlib.sha256(content).digest()
        if len(content) and digest not in seen:
            seen.add(digest)
            yield held_out == 1 or _place(name) < held_out, name, content, 0, len(content)


def _build(
    folder: Path, key: str, source: Source, tokenizer: Tokenizer, held_out: float, shard_tokens: int, progress: Progress
) -> None:
    """Write a corpus into a temporary folder beside its place, then move it there in one step."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise StorageError(
            f"cannot write the corpus to {folder}: {error}; LONGSCAN_CACHE names another place"
        ) from error
    try:
        about = _write(building, source, tokenizer, held_out, shard_tokens, progress)
        empty = "held-out" if not about["held_out_documents"] else "training" if not about["train_documents"] else None
        if empty and (held_out < 1 or empty == "held-out"):
            raise DataError(
                f"data: {source.label} leaves the {empty} part empty "
                f"({about['train_bytes'] + about['held_out_bytes']} bytes in all, held_out={held_out}); "
                "give more text or more documents, or another fraction"
            )
        tokenizer.save(building)
        about |= {"format": _FORMAT, "key": key, "label": source.label, "tokenizer": tokenizer.identity}
        write_text(building / MANIFEST, json.dumps({**about, "self": json_digest(about)}, indent=2) + "\n")
        flush(building)
        try:
            os.rename(building, folder)
            flush(folder.parent)
        except OSError as error:
            # Another process has just built the same corpus.
            if not (folder / MANIFEST).is_file():
                raise StorageError(f"cannot write the corpus to {folder}: {error}; is it another folder?") from error
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(
            f"cannot write the corpus to {folder}: {error}; LONGSCAN_CACHE names another place"
        ) from error
    finally:
        shutil.rmtree(building, ignore_errors=True)


@dataclasses.dataclass
class _Piece:
    """Some text of a document; ``first``: it begins there."""

    is_held_out: bool
    place: float
    first: bool
    text: bytes


def _batches(source: Source, held_out: float) -> Iterator[list[_Piece]]:
    """All text, as much at once as keeps all cores at work."""
    batch: list[_Piece] = []
    size, enough = 0, max(_LEAST_TEXT, _TEXT_PER_CORE * (os.cpu_count() or 1))
    for is_held_out, name, content, start, end in _split(source, held_out):
        place, first = _place(name), True
        for text in pieces(content, start, end):
            batch.append(_Piece(is_held_out, place, first, text))
            first, size = False, size + len(text)
            if size >= enough:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _write(
    folder: Path, source: Source, tokenizer: Tokenizer, held_out: float, shard_tokens: int, progress: Progress
) -> dict[str, Any]:
    dtype = np.min_scalar_type(tokenizer.vocab_size - 1)
    border = np.array([tokenizer.border], dtype)
    counts = dict.fromkeys(_COUNTS, 0)
    # Of each training document: its place in the order, and its first token as they come.
    places, starts = array.array("d"), array.array("q")
    rest = ShardWriter(folder, "held_out", dtype, 1 << 62)
    unordered = ShardWriter(folder, "unordered", dtype, 1 << 62)
    train = ShardWriter(folder, "train", dtype, shard_tokens)
    done = 0
    try:
        with open(folder / _HELD_OUT_TEXT, "wb") as text:
            for batch in _batches(source, held_out):
                encoded = tokenizer.encode_batch([piece.text for piece in batch])
                for piece, tokens in zip(batch, encoded, strict=True):
                    part, writer = ("held_out", rest) if piece.is_held_out else ("train", unordered)
                    if piece.first:
                        if not piece.is_held_out:
                            places.append(piece.place)
                            starts.append(writer.tokens)
                        writer.append(border)
                        counts[f"{part}_documents"] += 1
                    writer.append(tokens)
                    counts[f"{part}_bytes"] += tokenizer.byte_length(piece.text)
                    if piece.is_held_out:
                        text.write(piece.text)
                    done += len(piece.text)
                progress("tokenizing", done, None)
        for spilled in unordered.close():  # one, or none
            _put_in_order(Tokens(folder, dtype.name, [spilled]), places, starts, train, progress)
            (folder / spilled.file).unlink()
        shards = {"train": train.close(), "held_out": rest.close()}
    finally:
        for writer in (rest, unordered, train):
            writer.abandon()
    flush(folder / _HELD_OUT_TEXT)
    return {
        "dtype": dtype.name,
        "vocab_size": tokenizer.vocab_size,
        "train_tokens": train.tokens,
        "held_out_tokens": rest.tokens,
        **counts,
        **{part: [dataclasses.asdict(shard) for shard in found] for part, found in shards.items()},
        "held_out_text": file_digest(folder / _HELD_OUT_TEXT),
    }


def _put_in_order(
    tokens: Tokens, places: array.array[float], starts: array.array[int], train: ShardWriter, progress: Progress
) -> None:
    """Write documents by their places in the order."""
    first = np.frombuffer(starts, np.int64)
    end = np.append(first[1:], len(tokens))
    for document in np.argsort(np.frombuffer(places), kind="stable"):
        train.append(tokens[int(first[document]) : int(end[document])])
        progress("shuffling", train.tokens, len(tokens))
