"""Writes are whole or did not happen; reads are checked."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from longscan.errors import CheckpointError, StorageError
from longscan.nn.storage import flush, load_tensors, save_tensors, write_atomically, write_text


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = write_text(tmp_path / "note", "old")

    def fail(temporary: Path) -> None:
        temporary.write_text("half of it")
        raise OSError(28, "No space left on device")

    with pytest.raises(StorageError, match="No space left"):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["note"]


def test_other_exceptions_pass_and_clean_up(tmp_path: Path) -> None:
    def fail(temporary: Path) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "note", fail)
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(sys.platform == "win32", reason="no file size limits")
def test_a_full_disk(tmp_path: Path) -> None:
    """A limit on the size of files stands in for a disk that fills up in the middle of a write."""
    program = f"""
import resource, signal, torch
from longscan.errors import StorageError
from longscan.nn.storage import flush, load_tensors, save_tensors
save_tensors({str(tmp_path / "x")!r}, {{"x": torch.ones(4)}}, {{}})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    save_tensors({str(tmp_path / "x")!r}, {{"x": torch.ones(100_000)}}, {{}})
except StorageError:
    assert len(load_tensors({str(tmp_path / "x")!r})[0]["x"]) == 4
    raise SystemExit(7)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 7, run.stderr
    assert os.listdir(tmp_path) == ["x"]


def test_what_is_flushed_is_open_for_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows refuses to flush any other file."""
    fcntl = pytest.importorskip("fcntl")
    flushed = []

    def fsync(descriptor: int) -> None:
        flushed.append(stat.S_ISDIR(os.fstat(descriptor).st_mode))
        assert flushed[-1] or fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY

    monkeypatch.setattr(os, "fsync", fsync)
    path = write_text(tmp_path / "note", "new")
    flush(path)
    flush(tmp_path)
    assert flushed == [False, False, True]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        write_text(tmp_path / "file" / "below", "x")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_tensors_come_back(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {"a": torch.ones(3, 2).to(dtype), "empty": torch.ones(0, 2).to(dtype), "scalar": torch.ones(()).to(dtype)}
    back, metadata = load_tensors(save_tensors(tmp_path / "t", tensors, {"key": "value"}))
    assert metadata["key"] == "value"
    assert {name: tensor.dtype for name, tensor in back.items()} == dict.fromkeys(tensors, dtype)
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


def test_a_file_of_another_program_has_no_checksum(tmp_path: Path) -> None:
    import safetensors.torch

    safetensors.torch.save_file({"a": torch.ones(2)}, tmp_path / "t")
    assert torch.equal(load_tensors(tmp_path / "t")[0]["a"], torch.ones(2))
    with pytest.raises(CheckpointError, match="no such file"):
        load_tensors(tmp_path / "u")


def test_equal_tensors_are_equal_files(tmp_path: Path) -> None:
    """The writer puts metadata in an order of chance, anew in each process."""
    metadata = {str(i): "word" for i in range(12)}
    tensors = {"b": torch.arange(6.0).view(2, 3), "a": torch.ones(3, dtype=torch.bfloat16)}
    code = (
        "import sys, torch; from longscan.nn.storage import save_tensors; "
        "save_tensors(sys.argv[1], {'b': torch.arange(6.0).view(2, 3), 'a': torch.ones(3, dtype=torch.bfloat16)}, "
        "{str(i): 'word' for i in range(12)})"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "other")], check=True)
    path = save_tensors(tmp_path / "one", tensors, metadata)
    assert path.read_bytes() == (tmp_path / "other").read_bytes()
    again, found = load_tensors(path)
    assert {name: found[name] for name in metadata} == metadata
    assert torch.equal(again["b"], tensors["b"])
    assert torch.equal(again["a"], tensors["a"])
