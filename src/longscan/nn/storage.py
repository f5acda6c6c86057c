"""Files of tensors that are either whole or not there: atomic writes, checked reads, no pickle."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longscan.errors import CheckpointError, StorageError

_CHECKSUM = "longscan.crc32"


def write_atomically(path: str | os.PathLike[str], write: Callable[[Path], object]) -> Path:
    """Call ``write`` on a temporary file beside ``path``, then put it in its place in one step.

    Whatever happens before that step (an exception, a full disk, a killed process) leaves what was at ``path``
    untouched.

    Raises:
        StorageError: the file system refused, with its reason.
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        os.close(descriptor)
        temporary = Path(name)
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        # mkstemp makes a file only its owner reads; give it the mode a plain open() would have.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        os.replace(temporary, path)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error}; what was there before is untouched") from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
    return path


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write a text file atomically (UTF-8)."""
    return write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def file_digest(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's contents."""
    value = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            value.update(block)
    return value.hexdigest()


def json_digest(values: Mapping[str, Any]) -> str:
    """SHA-256 of JSON values, whatever their order."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def flush(path: Path) -> None:
    """Make a file or a folder's list of names survive a power cut, where the system can."""
    try:
        # Windows flushes no file that is open for reading only.
        descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    except PermissionError:
        return  # Windows opens no folders
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Path:
    """Write named tensors as safetensors, atomically, with a checksum of their bytes among the metadata.

    Raises:
        StorageError: the file could not be written.
    """
    import safetensors
    import safetensors.torch

    stored = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    metadata = {**metadata, _CHECKSUM: str(_checksum(stored))}

    def write(temporary: Path) -> None:
        try:
            safetensors.torch.save_file(stored, temporary, metadata=metadata)
            _order_metadata(temporary)
        except safetensors.SafetensorError as error:
            raise OSError(str(error)) from error

    return write_atomically(path, write)


def _order_metadata(path: Path) -> None:
    """Puts a file's metadata in order, which its writer leaves to chance: equal tensors are to be equal files."""
    with open(path, "rb+") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        ordered = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        # The same words in another order; were they longer, the file would stay as it is.
        if len(ordered) <= size:
            file.seek(8)
            file.write(ordered.ljust(size))


def load_tensors(
    path: str | os.PathLike[str], device: torch.device | str | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read what :func:`save_tensors` wrote, or any other safetensors file: tensors and metadata.

    Raises:
        CheckpointError: the file is missing, is no safetensors file, is cut short, or its bytes have changed.
    """
    import safetensors

    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged, truncated or not a safetensors file: {error}") from error
    if _CHECKSUM in metadata and metadata[_CHECKSUM] != str(_checksum(tensors)):
        raise CheckpointError(f"{path} is damaged: its contents do not match the checksum written with them")
    if device is not None and torch.device(device).type != "cpu":
        tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    return tensors, metadata


def save_pickled(path: str | os.PathLike[str], tensors: Mapping[str, Tensor]) -> Path:
    """Write named tensors as ``torch.save`` does, atomically: for packages that read nothing else.

    Raises:
        StorageError: the file could not be written.
    """
    stored = {name: tensor.detach().to("cpu") for name, tensor in tensors.items()}

    def write(temporary: Path) -> None:
        try:
            torch.save(stored, temporary)
        except RuntimeError as error:  # of its zip writer, also where a disk is full
            raise OSError(str(error)) from error

    return write_atomically(path, write)


def load_pickled(path: str | os.PathLike[str], device: torch.device | str | None = None) -> dict[str, Tensor]:
    """Read named tensors that ``torch.save`` wrote; nothing but tensors is ever unpickled.

    Raises:
        CheckpointError: the file is missing, damaged or cut short, or holds other things than tensors by name.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        tensors = torch.load(path, map_location=device or "cpu", weights_only=True, mmap=True)
    except Exception as error:  # of zip, pickle and torch, of many kinds
        raise CheckpointError(f"{path} is damaged, truncated or holds more than tensors: {error}") from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise CheckpointError(f"{path}: expected tensors by name")
    return dict(tensors)


def _checksum(tensors: Mapping[str, Tensor]) -> int:
    crc = 0
    for name in sorted(tensors):
        crc = zlib.crc32(name.encode(), crc)
        flat = tensors[name].contiguous().reshape(-1).view(torch.uint8)
        crc = zlib.crc32(flat.numpy(), crc)  # type: ignore[arg-type]
    return crc
