"""Shards of tokens: the same tokens however they are cut, memory, checksums, resuming, and folders that travel."""

from __future__ import annotations

import json
import os
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longscan.cli import main
from longscan.errors import DataError
from longscan.nn.storage import json_digest
from longscan.tasks import corpus as corpus_module
from longscan.tasks import sources
from longscan.tasks.corpus import Corpus, build_corpus, open_corpus
from longscan.tasks.shards import ShardWriter, Tokens
from longscan.tasks.sources import open_source
from longscan.tasks.text import TextConfig, prepare
from longscan.tasks.tokenizers import ByteTokenizer, HubTokenizer
from longscan.training import Batches


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for i in range(60):
        (folder / f"{i:03}.txt").write_text(f"document {i} " * (1 + i % 5))
    return folder


def build(texts: Path, cache: Path, shard_tokens: int = 100) -> Corpus:
    source = open_source(str(texts))
    return build_corpus(source, ByteTokenizer(), held_out=0.2, cache=cache, shard_tokens=shard_tokens)


@pytest.fixture
def corpus(texts: Path, tmp_path: Path) -> Corpus:
    return build(texts, tmp_path / "cache")


@settings(max_examples=60, deadline=None)
@given(data=st.data(), limit=st.integers(1, 30), sizes=st.lists(st.integers(0, 20), min_size=1, max_size=8))
def test_a_row_in_shards_is_the_row(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, limit: int, sizes: list[int]
) -> None:
    whole = np.arange(sum(sizes), dtype=np.uint16)
    folder = tmp_path_factory.mktemp("row")
    writer = ShardWriter(folder, "row", whole.dtype, limit)
    for part in np.split(whole, np.cumsum(sizes)[:-1]):
        writer.append(part)
    row = Tokens(folder, "uint16", writer.close())
    assert len(row) == len(whole)
    np.testing.assert_array_equal(np.array(row), whole)
    start, end = data.draw(st.integers(-5, 200)), data.draw(st.integers(-5, 200))
    np.testing.assert_array_equal(row[start:end], whole[start:end])


def test_shards_hold_what_one_file_holds(corpus: Corpus, texts: Path, tmp_path: Path) -> None:
    whole = build(texts, tmp_path / "other", shard_tokens=1 << 20)
    assert whole.key == corpus.key
    assert len(list(whole.folder.glob("train-*.bin"))) == 1
    assert len(list(corpus.folder.glob("train-*.bin"))) > 5
    np.testing.assert_array_equal(np.array(corpus.train), np.array(whole.train))
    assert not list(corpus.folder.glob("unordered*"))


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("carry_state", [False, True])
def test_any_number_of_ranks_goes_on_with_the_same_windows(corpus: Corpus, ranks: int, carry_state: bool) -> None:
    whole = Batches(np.array(corpus.train), 6, 16, seed=5, carry_state=carry_state)
    # As after a resume: another process opens the folder, at a step in the middle.
    again = Batches(open_corpus(corpus.folder).train, 6, 16, seed=5, carry_state=carry_state)
    for step in (3, 4, 40):
        each = 6 // ranks
        parts = [again.batch(step, slice(rank * each, (rank + 1) * each)) for rank in range(ranks)]
        for ours, expected in zip(zip(*parts, strict=True), whole.batch(step), strict=True):
            torch.testing.assert_close(torch.cat(ours), expected)


def test_a_text_larger_than_what_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "book.txt"
    path.write_bytes(b"".join(b"this is line %d\n" % i for i in range(1_500_000)))
    monkeypatch.setattr(sources, "_LARGE", 1 << 20)
    monkeypatch.setattr(corpus_module, "_TEXT_PER_CORE", 1 << 10)
    monkeypatch.setattr(corpus_module, "_LEAST_TEXT", 1 << 20)
    tracemalloc.start()
    try:
        corpus = build_corpus(open_source(str(path)), ByteTokenizer(), held_out=0.1, cache=tmp_path / "cache")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert path.stat().st_size > 30e6
    assert peak < 8e6
    assert bytes(np.array(corpus.train))[1:] + corpus.held_out_text() == path.read_bytes()


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "gone":
        path.unlink()
    elif how == "cut":
        path.write_bytes(content[:-7])
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content)


@pytest.mark.parametrize("how", ["gone", "cut", "changed"])
@pytest.mark.parametrize("name", ["train-00002.bin", "held_out-00000.bin", "held_out.txt", "manifest.json"])
def test_damage_is_refused_by_name(corpus: Corpus, name: str, how: str) -> None:
    damage(corpus.folder / name, how)
    with pytest.raises(DataError, match=rf"{name}.* delete "):
        open_corpus(corpus.folder)


def test_a_shard_that_is_cut_short_while_it_is_read(corpus: Corpus) -> None:
    """It is named; a file that was deleted, or replaced by another, is still mapped."""
    path = corpus.folder / "train-00000.bin"
    os.truncate(path, 3)
    with pytest.raises(DataError, match=rf"{path} was cut short meanwhile: 3 of \d+ bytes"):
        corpus.train[:8]
    held_out = corpus.folder / "held_out-00000.bin"
    before = np.array(corpus.held_out)
    held_out.rename(corpus.folder / "kept")
    np.testing.assert_array_equal(corpus.held_out[:], before)
    held_out.write_bytes(b"other")
    np.testing.assert_array_equal(corpus.held_out[:], before)


def test_ranks_share_the_reading(corpus: Corpus) -> None:
    damage(corpus.folder / "train-00002.bin", "changed")
    refused = []
    for rank in range(3):
        try:
            open_corpus(corpus.folder, share=(rank, 3))
        except DataError:
            refused.append(rank)
    assert refused == [2]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("format", 9, "format 9"),
        ("dtype", "object", "dtype"),
        ("train_bytes", -1, "train_bytes"),
        ("train", [{"file": "../x", "tokens": 1, "sha256": ""}], "not in its folder"),
        ("train", [{"file": "x", "tokens": 1.5, "sha256": ""}], "not whole"),
        ("train", [{"name": "x"}], "unexpected keyword"),
    ],
)
def test_a_manifest_forged_with_its_checksum(corpus: Corpus, key: str, value: object, message: str) -> None:
    path = corpus.folder / "manifest.json"
    about = json.loads(path.read_text())
    del about["self"]
    about[key] = value
    path.write_text(json.dumps(about | {"self": json_digest(about)}))
    with pytest.raises(DataError, match=message):
        open_corpus(corpus.folder)


def test_a_build_that_is_killed_leaves_no_corpus(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(what: str, done: int, whole: int | None) -> None:
        if what == "shuffling":
            raise KeyboardInterrupt

    source, cache = open_source(str(texts)), tmp_path / "cache"
    with pytest.raises(KeyboardInterrupt):
        build_corpus(source, ByteTokenizer(), held_out=0.2, cache=cache, progress=stop)
    assert os.listdir(cache / "shards") == []


def test_prepared_shards_travel(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LONGSCAN_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "shards"
    arguments = ["prepare", "--data", str(texts), "--held-out", "0.2", "--out", str(out)]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert f"shards: {out}" in said
    assert "held out: " in said
    assert main(arguments) == 0  # checked, not built anew
    moved = shutil.move(out, tmp_path / "elsewhere")
    found, tokenizer = prepare(TextConfig(str(moved)))
    assert isinstance(tokenizer, ByteTokenizer)
    expected, _ = prepare(TextConfig(str(texts), held_out=0.2))
    assert found.key == expected.key
    np.testing.assert_array_equal(np.array(found.train), np.array(expected.train))


def test_another_folder_is_not_overwritten(texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    assert main(["prepare", "--data", str(texts), "--out", str(tmp_path)]) == 2
    assert "cannot write the corpus" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["mine.txt"]
    out = tmp_path / "shards"
    assert main(["prepare", "--data", str(texts), "--out", str(out)]) == 0
    assert main(["prepare", "--data", str(texts / "001.txt"), "--out", str(out)]) == 2
    assert "name another folder" in capsys.readouterr().err


def test_prepared_shards_keep_their_tokenizer(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    monkeypatch.setenv("LONGSCAN_CACHE", str(tmp_path / "cache"))
    config = TextConfig(str(texts), tokenizer="bpe:300", held_out=0.2)
    first, tokenizer = prepare(config, out=tmp_path / "shards")
    found, own = prepare(TextConfig(str(tmp_path / "shards")))
    assert own.identity == tokenizer.identity
    assert own.decode(found.held_out.tolist()) == first.held_out_text().decode()
    with pytest.raises(DataError, match="another tokenizer"):
        prepare(TextConfig(str(tmp_path / "shards")), ByteTokenizer())
    # A file that asks for short texts does not shorten a corpus.
    short = tokenizers.Tokenizer.from_file(str(tmp_path / "shards" / "tokenizer.json"))
    short.enable_truncation(3)
    short.enable_padding(length=8)
    assert HubTokenizer(short).encode(b"document 17").tolist() == own.encode(b"document 17").tolist()
