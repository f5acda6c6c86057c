"""A tokenizer learnt from the text."""

from __future__ import annotations

from pathlib import Path

import pytest

from longscan.errors import DataError
from longscan.tasks.bpe import learn_bpe
from longscan.tasks.sources import open_source
from longscan.tasks.text import TextConfig, prepare

pytest.importorskip("tokenizers")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LONGSCAN_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(60):
        (folder / f"{i:02}.txt").write_text(f"the selective state space {i}, déjà vu " * 5)
    return folder


def test_text_comes_back_and_takes_fewer_tokens(folder: Path, tmp_path: Path) -> None:
    corpus, tokenizer = prepare(TextConfig(str(folder), "bpe:300", held_out=0.2))
    assert 257 < tokenizer.vocab_size <= 300
    assert len(corpus.held_out) < 0.5 * corpus.held_out_bytes
    text = "the selective state space of \u4e2d\u6587 \x7f"
    assert tokenizer.decode(tokenizer.encode(text.encode()).tolist()) == text
    assert tokenizer.border not in tokenizer.encode(b"the end")
    borders = (corpus.held_out == tokenizer.border).sum()
    assert borders == corpus.held_out_documents
    (kept,) = (tmp_path / "cache" / "tokenizers").iterdir()
    written = kept.stat().st_mtime_ns
    again, other = prepare(TextConfig(str(folder), "bpe:300", held_out=0.2))
    assert (again.key, other.identity) == (corpus.key, tokenizer.identity)
    assert kept.stat().st_mtime_ns == written


def test_what_is_held_out_is_not_learnt_from(tmp_path: Path) -> None:
    path = tmp_path / "one.txt"
    path.write_bytes(b"abab " * 400 + b"xyxy " * 400)
    tokenizer = learn_bpe("bpe:280", open_source(str(path)), held_out=0.5, cache=tmp_path / "cache")
    assert len(tokenizer.encode(b"abab")) < 4
    assert len(tokenizer.encode(b"xyxy")) == 4


@pytest.mark.parametrize("name", ["bpe:", "bpe:many", "bpe:100"])
def test_sizes_that_are_none(name: str, folder: Path) -> None:
    with pytest.raises(DataError, match="a number of at least 257"):
        prepare(TextConfig(str(folder), name))
