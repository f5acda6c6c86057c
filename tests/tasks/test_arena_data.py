"""Text, pairs and images of the Long Range Arena, from small files in the formats that they come in."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from longscan.errors import DataError
from longscan.tasks.byte_text import ByteText, Retrieval
from longscan.tasks.grey_images import GreyImages
from longscan.tasks.labelled_text import pack

CPU = torch.device("cpu")
TEXTS = [("dull, long", 0), ("a joy", 1), ("naïve", 1), ("b" * 40, 0)]


def rows(task: ByteText | GreyImages, part: str = "train") -> list[tuple[bytes, int]]:
    split = task.on(CPU)
    inputs, targets = (
        (split.train_inputs, split.train_targets) if part == "train" else (split.test_inputs, split.test_targets)
    )
    return [(row.numpy().tobytes(), int(target)) for row, target in zip(inputs, targets, strict=True)]


def write_tsv(folder: Path) -> str:
    for part, some in (("train", TEXTS), ("test", TEXTS[:2])):
        (folder / f"{part}.tsv").write_text("".join(f"{label}\t{text}\n" for text, label in some), encoding="utf-8")
    return str(folder)


def write_json_lines(folder: Path) -> str:
    for part, some in (("train", TEXTS), ("test", TEXTS[:2])):
        lines = [json.dumps({"text": text, "label": label}) for text, label in some]
        (folder / f"{part}.jsonl").write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    return str(folder)


def write_folders(folder: Path) -> str:
    for part, some in (("train", TEXTS), ("test", TEXTS[:2])):
        for number, (text, label) in enumerate(some):
            path = folder / part / ("neg", "pos")[label] / f"{number}_7.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    (folder / "train" / "unsup").mkdir()
    (folder / "train" / "unsup" / "0_0.txt").write_text("nobody said")
    return str(folder)


@pytest.mark.parametrize("write", [write_tsv, write_json_lines, write_folders])
def test_texts_are_bytes_cut_and_filled_up(write: object, tmp_path: Path) -> None:
    task = ByteText(length=12, data=write(tmp_path))  # type: ignore[operator]
    expected = sorted((text.encode()[:12].ljust(12, b"\0"), label) for text, label in TEXTS)
    assert sorted(rows(task)) == expected
    assert sorted(rows(task, "test")) == sorted((t.encode().ljust(12, b"\0"), label) for t, label in TEXTS[:2])
    tokens, targets = task.sample(50, torch.Generator().manual_seed(0))
    assert tokens.dtype == targets.dtype == torch.int64
    lengths = {bytes(row): len(bytes(row).rstrip(b"\0")) for row in tokens.to(torch.uint8).numpy()}
    assert task.lengths(tokens).tolist() == [lengths[bytes(row)] for row in tokens.to(torch.uint8).numpy()]
    assert set(lengths.values()) == {5, 6, 10, 12}


def test_no_text_is_empty_and_none_ends_within() -> None:
    packed, _ = pack([((b"",), 0), ((b"a\0b",), 0)], 1, 4)
    assert packed.tolist() == [[32, 0, 0, 0], [97, 32, 98, 0]]


def write_pairs(folder: Path) -> str:
    pairs = [(1.0, "one paper", "another"), (0.0, "x", "y" * 20)]
    for part in ("train", "eval", "test"):
        lines = [f"{label}\tP01\tP02\t{first}\t{second}\n" for label, first, second in pairs]
        (folder / f"new_aan_pairs.{part}.tsv").write_text("".join(lines))
    return str(folder)


def test_pairs_stand_side_by_side(tmp_path: Path) -> None:
    task = Retrieval(length=10, data=write_pairs(tmp_path))
    assert rows(task) == [(b"one paper\0another\0\0\0", 1), (b"x" + bytes(9) + b"y" * 10, 0)]
    tokens, _ = next(iter(task.tests(10, 1, 8, CPU, 0)))
    assert task.lengths(tokens).tolist() == [[9, 7], [1, 10]]


def test_pairs_of_json_lines(tmp_path: Path) -> None:
    for part in ("train", "test"):
        (tmp_path / f"{part}.jsonl").write_text('{"label": 1, "text1": "ab", "text2": "c"}\n')
    assert rows(Retrieval(length=3, data=str(tmp_path))) == [(b"ab\0c\0\0", 1)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("x\ttext\n", "train.tsv, line 1 is not as it should be"),
        ("1\n", "train.tsv, line 1 is not as it should be"),
        ("2\ttext\n", "classes must be 0 .. 1, got 2 to 2"),
        ("\n", "the train part of .* is empty"),
    ],
)
def test_files_that_are_not_as_they_should_be(line: str, message: str, tmp_path: Path) -> None:
    write_tsv(tmp_path)
    (tmp_path / "train.tsv").write_text(line)
    with pytest.raises(DataError, match=message):
        ByteText(data=str(tmp_path)).on(CPU)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no train part; give a folder"):
        ByteText(data=str(tmp_path)).on(CPU)
    (tmp_path / "a-train.tsv").touch()
    (tmp_path / "b-train.tsv").touch()
    with pytest.raises(DataError, match=r"several files \*train.tsv: a-train.tsv, b-train.tsv"):
        ByteText(data=str(tmp_path)).on(CPU)
    with pytest.raises(DataError, match="no train part; give a folder with data_batch"):
        GreyImages(data=str(tmp_path)).on(CPU)


def write_images(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    colours, classes = random.integers(0, 256, (5, 3, 32, 32), np.uint8), np.array([3, 0, 9, 1, 2], np.uint8)
    colours[0, :, 0, :2] = [[255, 0], [255, 0], [255, 200]]  # a white pixel, a blue one
    records = np.concatenate([classes[:, None], colours.reshape(5, -1)], axis=1)
    for name, part in (("data_batch_1", records[:2]), ("data_batch_2", records[2:3]), ("test_batch", records[3:])):
        part.tofile(folder / f"{name}.bin")
    return colours, classes


def test_images_lose_their_colours(tmp_path: Path) -> None:
    colours, classes = write_images(tmp_path)
    task = GreyImages(data=str(tmp_path))
    grey = (0.299 * colours[:, 0] + 0.587 * colours[:, 1] + 0.114 * colours[:, 2]).reshape(5, -1)
    split = task.on(CPU)
    assert split.train_inputs[0, :2].tolist() == [255, 23]
    assert np.abs(torch.cat([split.train_inputs, split.test_inputs]).numpy() - grey).max() <= 0.5001
    assert torch.cat([split.train_targets, split.test_targets]).tolist() == classes.tolist()
    inputs, _ = task.sample(4, torch.Generator().manual_seed(0))
    assert inputs.shape == (4, 1024, 1)
    assert -1 <= float(inputs.min()) < float(inputs.max()) == 1


def test_damaged_images(tmp_path: Path) -> None:
    write_images(tmp_path)
    path = tmp_path / "data_batch_1.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(DataError, match="6,145 bytes, which are no records of 3,073"):
        GreyImages(data=str(tmp_path)).on(CPU)
    path.write_bytes(b"\x0a" + whole[1:])
    with pytest.raises(DataError, match=r"classes must be 0 .. 9, got 10"):
        GreyImages(data=str(tmp_path)).on(CPU)


def test_sets_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    class Columns(list):
        def __getitem__(self, key: object) -> object:
            return [row[key] for row in self] if isinstance(key, str) else list.__getitem__(self, key)  # type: ignore[call-overload]

    image = np.zeros((32, 32, 3), np.uint8)
    sets = {
        "reviews": [{"text": "good", "label": 1}, {"text": "bad", "label": 0}],
        "pictures": [{"img": image, "label": 4}, {"img": image + 255, "label": 5}],
    }

    def load_dataset(name: str, split: str) -> Columns:
        assert split in ("train", "test")
        return Columns(sets[name])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert rows(ByteText(length=4, data="hf:reviews")) == [(b"good", 1), (b"bad\0", 0)]
    assert rows(GreyImages(data="hf:pictures")) == [(bytes(1024), 4), (b"\xff" * 1024, 5)]
    with pytest.raises(DataError, match="cannot read the data set 'nowhere'"):
        ByteText(data="hf:nowhere").on(CPU)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="needs the package `datasets`"):
        ByteText(data="hf:reviews").on(CPU)
