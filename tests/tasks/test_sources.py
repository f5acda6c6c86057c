"""Where text comes from, and what is said when it does not."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import pytest

from longscan.errors import DataError
from longscan.tasks.sources import STDLIB, last_part, open_source, pieces


def test_standard_library_is_python_only_and_the_same_twice() -> None:
    source = open_source(STDLIB)
    names = [name for name, _ in source.documents()]
    assert "ast.py" in names
    assert all(name.endswith(".py") for name in names)
    assert not [name for name in names if "site-packages" in name]
    assert names == [name for name, _ in source.documents()]


def test_folder_takes_text_files_in_order_and_leaves_binary_and_hidden_ones(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "two.txt").write_text("two")
    (tmp_path / "a.md").write_text("one")
    (tmp_path / "image.bin").write_bytes(b"\x00\x01")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("hidden")
    (tmp_path / "rows.jsonl").write_text('{"text": "three"}\n')
    documents = list(open_source(str(tmp_path)).documents())
    assert documents == [("a.md", b"one"), ("rows.jsonl:1", b"three"), ("b/two.txt", b"two")]


def test_json_lines_with_another_field_and_a_limit(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"body": f"text {i}"}) + "\n\n" for i in range(9)))
    documents = list(open_source(str(path), field="body", max_bytes=15).documents())
    assert [content for _, content in documents] == [b"text 0", b"text 1", b"tex"]


@pytest.mark.parametrize(
    ("content", "says"), [('{"text": 3}', "no text in field 'text'"), ("not json", "is not JSON"), ("[1]", "a list")]
)
def test_bad_json_lines_are_named(tmp_path: Path, content: str, says: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "good"}\n' + content + "\n")
    with pytest.raises(DataError, match=f"line 2.*{says}"):
        list(open_source(str(path)).documents())


def test_missing_and_unreadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="neither a file nor a folder"):
        open_source(str(tmp_path / "nothing.txt"))
    path = tmp_path / "secret.txt"
    path.write_text("x")

    def refuse(self: Path, mode: str) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError, match=r"cannot read .*secret.txt: Permission denied"):
        list(open_source(str(path)).documents())


def test_hub_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"needs the package `datasets`; install it"):
        open_source("hf:someone/something")


def test_hub_is_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    taken = []

    def load_dataset(*arguments: object, **options: object) -> object:
        calls.append((arguments, options))
        return ({"text": taken.append(i) or f"row {i}"} for i in range(10**9))

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    source = open_source("hf:someone/something:en", max_bytes=12)
    assert [content for _, content in source.documents()] == [b"row 0", b"row 1", b"ro"]
    assert calls == [(("someone/something", "en"), {"split": "train", "streaming": True})]
    assert len(taken) == 3


def test_hub_by_the_real_package_on_local_files(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    assert datasets is not None
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(5)))
    documents = list(open_source(f"hf:{tmp_path}").documents())
    assert [content for _, content in documents] == [f"row {i}".encode() for i in range(5)]


def test_pieces_and_halves_lose_nothing() -> None:
    text = b"".join(b"line %d\n" % i for i in range(300_000))
    cut = list(pieces(text, 0, len(text)))
    assert b"".join(cut) == text
    assert len(cut) > 1
    assert all(piece.endswith(b"\n") for piece in cut)
    place = last_part(text, 0.05)
    head, tail = text[:place], text[place:]
    assert head.endswith(b"\n")
    assert len(tail) / len(text) == pytest.approx(0.05, rel=1e-3)
