"""Digits: IDX files are read to the bit, the permutation is one for all, and the held-out part is held out."""

from __future__ import annotations

import gzip
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from longscan.errors import ArgumentError, DataError
from longscan.tasks.digits import DigitsStandin, PermutedDigits, PermutedDigitsStandin, SequentialDigits
from longscan.tasks.idx import read_idx

CPU = torch.device("cpu")


def write_idx(path: Path, array: np.ndarray) -> None:
    code = {"uint8": 0x08, "int16": 0x0B, "float64": 0x0E}[array.dtype.name]
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, code, array.ndim, *array.shape)
    content = header + array.astype(array.dtype.newbyteorder(">")).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_digits(folder: Path) -> None:
    """Twelve images of 4 x 4 to train on and five held out, in torchvision's layout and spellings of either kind."""
    random = np.random.default_rng(0)
    for part, count, end in (("train", 12, ""), ("t10k", 5, ".gz")):
        images = random.integers(0, 256, (count, 4, 4), dtype=np.uint8)
        write_idx(folder / "MNIST" / "raw" / f"{part}-images-idx3-ubyte{end}", images)
        name = f"{part}-labels.idx1-ubyte" if part == "t10k" else f"{part}-labels-idx1-ubyte"
        write_idx(folder / "MNIST" / "raw" / name, np.arange(count, dtype=np.uint8) % 10)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_digits(tmp_path)
    return tmp_path


@pytest.mark.parametrize("dtype", ["uint8", "int16", "float64"])
@pytest.mark.parametrize("name", ["a", "a.gz"])
def test_idx_files_are_read_to_the_bit(dtype: str, name: str, tmp_path: Path) -> None:
    array = (np.arange(24).reshape(2, 3, 4) * 5).astype(dtype)
    write_idx(tmp_path / name, array)
    found = read_idx(tmp_path / name)
    assert found.dtype == array.dtype
    assert np.array_equal(found, array)


def test_pixels_come_row_by_row_from_the_training_part(folder: Path) -> None:
    task = SequentialDigits(length=16, data=str(folder))
    images = read_idx(folder / "MNIST/raw/train-images-idx3-ubyte")
    inputs, targets = task.sample(200, torch.Generator().manual_seed(0))
    assert inputs.shape == (200, 16, 1)
    assert inputs.dtype == torch.float32
    assert set(targets.tolist()) == set(range(10))
    rows = {(images[k].flatten() / np.float32(255)).tobytes(): k % 10 for k in range(12)}
    for row, target in zip(inputs.numpy(), targets.tolist(), strict=True):
        assert rows[row.tobytes()] == target


def test_the_held_out_part_comes_whole_and_in_order(folder: Path) -> None:
    task = SequentialDigits(length=16, data=str(folder))
    batches = list(task.tests(16, 1, 2, CPU, 0))
    assert [len(targets) for _, targets in batches] == [2, 2, 1]
    assert task.held_out == 5
    inputs = torch.cat([inputs for inputs, _ in batches])
    images = read_idx(folder / "MNIST/raw/t10k-images-idx3-ubyte.gz")
    assert np.allclose(inputs.numpy(), images.reshape(5, 16, 1) / 255)
    assert torch.cat([targets for _, targets in batches]).tolist() == list(range(5))


def test_the_permutation_is_one_for_all(folder: Path) -> None:
    straight, permuted = SequentialDigits(16, str(folder)).on(CPU), PermutedDigits(16, str(folder)).on(CPU)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(permuted.train_inputs, straight.train_inputs[:, order])
    assert torch.equal(permuted.test_inputs, straight.test_inputs[:, order])


def test_the_stand_in_is_scikit_learns() -> None:
    pytest.importorskip("sklearn")
    split, permuted = DigitsStandin().on(CPU), PermutedDigitsStandin().on(CPU)
    assert split.train_inputs.shape == (1437, 64)
    assert split.test_inputs.shape == (360, 64)
    assert int(split.train_inputs.max()) == 255
    assert torch.equal(split.train_inputs.sort(1).values, permuted.train_inputs.sort(1).values)
    counts = split.test_targets.bincount()
    assert len(counts) == 10
    assert counts.min() > 25


def test_what_is_wrong_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ArgumentError, match="square image, got 15"):
        SequentialDigits(length=15)
    with pytest.raises(DataError, match=r"shape \(4, 4\).*needs a label for each, and 25 pixels"):
        SequentialDigits(length=25, data=str(folder)).on(CPU)
    with pytest.raises(DataError, match="no train-images-idx3-ubyte"):
        SequentialDigits(data=str(folder / "nothing")).on(CPU)
    file = folder / "MNIST/raw/train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DataError, match="has 207 bytes, its header says 208"):
        read_idx(file)
    file.write_bytes(b"PNG")
    with pytest.raises(DataError, match="is no IDX file"):
        read_idx(file)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match=r"needs the package.*longscan\[experiments\]"):
        DigitsStandin().load()


def test_a_set_of_the_hub_has_images_and_labels(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real package, on a data set that lies in a folder."""
    datasets = pytest.importorskip("datasets")
    images = read_idx(folder / "MNIST/raw/train-images-idx3-ubyte")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    rows = {"image": list(images), "label": list(range(12))}
    for part in ("train", "test"):
        (folder / "set").mkdir(exist_ok=True)
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "set" / f"{part}.parquet")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
    split = SequentialDigits(length=16, data=f"hf:{folder / 'set'}").on(CPU)
    assert np.array_equal(split.train_inputs.numpy(), images.reshape(12, 16))
    assert split.test_targets.tolist() == list(range(12))
