"""The corpus on disk: the split, the order, tokens and bytes, the cache."""

from __future__ import annotations

import errno
from pathlib import Path

import numpy as np
import pytest

from longscan.errors import DataError, StorageError
from longscan.tasks import corpus as corpus_module
from longscan.tasks.corpus import Corpus, build_corpus
from longscan.tasks.sources import open_source
from longscan.tasks.text import TextConfig, prepare
from longscan.tasks.tokenizers import ByteTokenizer, HubTokenizer, load_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(200):
        (folder / f"{i:03}.txt").write_text(f"document {i} " * (1 + i % 5))
    (folder / "copy.txt").write_text((folder / "000.txt").read_text())
    return folder


def build(folder: Path, cache: Path, held_out: float = 0.1) -> Corpus:
    return build_corpus(open_source(str(folder)), ByteTokenizer(), held_out=held_out, cache=cache)


def documents_of(tokens: np.ndarray) -> set[bytes]:
    return set(bytes(np.array(tokens)).split(b"\0")[1:])


def test_split_shares_nothing_and_loses_nothing(folder: Path, tmp_path: Path) -> None:
    corpus = build(folder, tmp_path / "cache")
    train, held_out = documents_of(corpus.train), documents_of(corpus.held_out)
    assert not train & held_out
    assert train | held_out == {path.read_bytes() for path in folder.iterdir()}
    assert corpus.train_documents + corpus.held_out_documents == 200  # the copy is left out
    assert 8 <= corpus.held_out_documents <= 35
    assert corpus.train_bytes == sum(map(len, train)) == len(corpus.train) - corpus.train_documents
    assert corpus.held_out_text() == b"".join(bytes(corpus.held_out).split(b"\0"))


def test_same_text_gives_the_same_corpus_anywhere(folder: Path, tmp_path: Path) -> None:
    first = build(folder, tmp_path / "one")
    moved = folder.rename(tmp_path / "elsewhere")
    second = build(moved, tmp_path / "two")
    assert first.key == second.key
    np.testing.assert_array_equal(first.train, second.train)
    np.testing.assert_array_equal(first.held_out, second.held_out)


def test_split_stays_when_documents_come(folder: Path, tmp_path: Path) -> None:
    before = build(folder, tmp_path / "cache")
    (folder / "new.txt").write_text("a new document")
    after = build(folder, tmp_path / "cache")
    assert before.key != after.key
    assert documents_of(before.held_out) - {b"a new document"} == documents_of(after.held_out) - {b"a new document"}


def test_cache_is_used(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build(folder, tmp_path / "cache")
    monkeypatch.setattr(corpus_module, "_build", None)
    assert build(folder, tmp_path / "cache").key == first.key
    with open(first.folder / "train-00000.bin", "r+b") as file:
        file.truncate(10)
    with pytest.raises(DataError, match="damaged"):
        build(folder, tmp_path / "cache")


def test_one_file_is_cut_by_position(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("".join(f"line {i}\n" for i in range(1000)))
    corpus = build(path, tmp_path / "cache")
    assert corpus.held_out_text().endswith(b"line 999\n")
    assert bytes(np.array(corpus.train))[1:] + corpus.held_out_text() == path.read_bytes()


def test_empty_and_tiny_texts_are_refused(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataError, match="part empty"):
        build(empty, tmp_path / "cache")
    (empty / "x.txt").write_text("")
    with pytest.raises(DataError, match=r"part empty \(0 bytes"):
        build(empty / "x.txt", tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("manifest.json"))


def test_everything_held_out(folder: Path, tmp_path: Path) -> None:
    corpus = build(folder, tmp_path / "cache", held_out=1.0)
    assert corpus.held_out_documents == 200
    assert len(corpus.train) == 0


def test_full_disk(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(corpus_module, "_write", full)
    with pytest.raises(StorageError, match=r"No space left on device.*LONGSCAN_CACHE"):
        build(folder, tmp_path / "cache")
    assert not list((tmp_path / "cache" / "shards").iterdir())


def test_hub_tokenizer_counts_bytes_of_the_text(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    own = tokenizers.Tokenizer(tokenizers.models.BPE())
    own.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    own.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    own.train_from_iterator((path.read_text() for path in folder.iterdir()), trainer)
    own.save(str(tmp_path / "tokenizer.json"))
    monkeypatch.setenv("LONGSCAN_CACHE", str(tmp_path / "cache"))
    in_bytes, _ = prepare(TextConfig(str(folder), held_out=0.1))
    corpus, tokenizer = prepare(TextConfig(str(folder), tokenizer=str(tmp_path), held_out=0.1))
    assert isinstance(tokenizer, HubTokenizer)
    assert corpus.train.dtype == np.uint16
    assert corpus.train_bytes == in_bytes.train_bytes
    assert corpus.held_out_text() == in_bytes.held_out_text()
    assert len(corpus.train) < len(in_bytes.train) / 2
    assert tokenizer.decode(corpus.held_out.tolist()) == corpus.held_out_text().decode()
    tokenizer.save(tmp_path / "cache")
    assert load_tokenizer(str(tmp_path / "cache" / "tokenizer.json")).identity == tokenizer.identity


def test_unknown_tokenizer(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="tokenizer: cannot load"):
        load_tokenizer(str(tmp_path))
