"""A row of tokens in files that are mapped into memory, whatever its size: written once, compared with checksums."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from longscan.errors import DataError
from longscan.nn.storage import file_digest, flush

_DTYPES = ("uint8", "uint16", "uint32")


@dataclasses.dataclass(frozen=True)
class Shard:
    """A file of a row: its name in the row's folder, how many tokens it holds, the SHA-256 of its bytes."""

    file: str
    tokens: int
    sha256: str


class ShardWriter:
    """Appends tokens to the files ``PREFIX-00000.bin``, ``PREFIX-00001.bin``, ...

    Args:
        folder, prefix: where.
        dtype: of the tokens.
        limit: of tokens in a file.
    """

    def __init__(self, folder: Path, prefix: str, dtype: np.dtype, limit: int) -> None:
        self._folder, self._prefix, self._dtype, self._limit = folder, prefix, dtype, limit
        self._shards: list[Shard] = []
        self._file: Any = None
        #: Tokens so far.
        self.tokens = 0

    def append(self, tokens: np.ndarray) -> None:
        while len(tokens):
            if self._file is None:
                self._name = f"{self._prefix}-{len(self._shards):05}.bin"
                self._file = open(self._folder / self._name, "wb")  # noqa: SIM115 (closed by _finish)
                self._digest, self._count = hashlib.sha256(), 0
            head, tokens = np.split(tokens, [min(len(tokens), self._limit - self._count)])
            content = np.ascontiguousarray(head, self._dtype).data
            self._file.write(content)
            self._digest.update(content)
            self._count += len(head)
            self.tokens += len(head)
            if self._count == self._limit:
                self._finish()

    def close(self) -> list[Shard]:
        """What was written, all of it on the disk."""
        if self._file is not None:
            self._finish()
        return self._shards

    def abandon(self) -> None:
        """Close the file that is open, if there is one, as it is."""
        if self._file is not None:
            self._file.close()

    def _finish(self) -> None:
        self._file.close()
        self._file = None
        flush(self._folder / self._name)
        self._shards.append(Shard(self._name, self._count, self._digest.hexdigest()))


class Tokens:
    """Tokens of several files as one row: ``len(row)``, ``row[5]`` and ``row[5:9]``; only what is asked for is read.

    Args:
        folder: of the files.
        dtype: "uint8", "uint16" or "uint32".
        shards: in the order of the row.

    Raises:
        DataError: a file is missing or of another size; or, when it is read, was cut short since.
    """

    def __init__(self, folder: Path, dtype: str, shards: Sequence[Shard]) -> None:
        self.dtype = np.dtype(dtype)
        self._maps: list[np.ndarray] = []
        self._files: list[tuple[Path, os.stat_result]] = []
        for shard in shards:
            path = folder / shard.file
            try:
                found = path.stat()
            except OSError as error:
                raise DataError(f"the shard {path} is missing or unreadable: {error.strerror or error}") from error
            expected = shard.tokens * self.dtype.itemsize
            if found.st_size != expected:
                raise DataError(f"the shard {path} is damaged: it has {found.st_size} bytes, {expected} were written")
            self._maps.append(np.memmap(path, dtype=self.dtype, mode="r"))
            self._files.append((path, found))
        self._ends = np.cumsum([0] + [shard.tokens for shard in shards], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, place: int | slice) -> Any:
        if not isinstance(place, slice):
            place = range(len(self))[place]
            return self[place : place + 1][0]
        start, stop, step = place.indices(len(self))
        if step != 1:
            raise IndexError(f"a row of tokens is read forward, token by token; got a step of {step}")
        first = int(np.searchsorted(self._ends, start, side="right")) - 1
        parts = []
        while start < stop:
            self._check(first)
            begin, end = self._ends[first], min(stop, int(self._ends[first + 1]))
            parts.append(self._maps[first][start - begin : end - begin])
            start, first = end, first + 1
        # A window inside of one file is not copied.
        return parts[0] if len(parts) == 1 else np.concatenate(parts) if parts else np.empty(0, self.dtype)

    def _check(self, number: int) -> None:
        """Reading past the end of a file that was cut short under its map would end the process without a word."""
        path, before = self._files[number]
        try:
            now = path.stat()
        except OSError:
            return  # the map outlives the name
        if now.st_ino == before.st_ino and now.st_size < before.st_size:
            raise DataError(
                f"the shard {path} was cut short meanwhile: {now.st_size} of {before.st_size} bytes are left"
            )

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self[:], dtype=dtype)


def read_shards(values: Any) -> list[Shard]:
    """Shards from a manifest.

    Raises:
        ValueError, TypeError: they are not what :class:`Shard` says, or lie elsewhere than in their folder.
    """
    shards = [Shard(**entry) for entry in values]
    for shard in shards:
        if Path(shard.file).name != shard.file:
            raise ValueError(f"it names a file that is not in its folder: {shard.file!r}")
        if type(shard.tokens) is not int or shard.tokens < 1 or not isinstance(shard.sha256, str):
            raise ValueError(f"what it says of {shard.file!r} is not whole")
    return shards


def read_dtype(values: Mapping[str, Any]) -> str:
    """The dtype that a manifest names.

    Raises:
        ValueError: it is none of unsigned integers.
    """
    if values["dtype"] not in _DTYPES:
        raise ValueError(f"its dtype is {values['dtype']!r}; allowed: {', '.join(_DTYPES)}")
    return str(values["dtype"])


def verify(folder: Path, shards: Sequence[Shard], progress: Callable[[int, int], None] = lambda done, of: None) -> None:
    """Compare files with their checksums, on all cores.

    Args:
        folder, shards: the files.
        progress: told how many tokens of how many are compared.

    Raises:
        DataError: a file is missing or has changed; the message names it.
    """
    done, whole = 0, sum(shard.tokens for shard in shards)
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        try:
            for shard, found in zip(
                shards, threads.map(lambda shard: _digest(folder / shard.file), shards), strict=True
            ):
                if found != shard.sha256:
                    raise DataError(
                        f"the shard {folder / shard.file} is damaged: its contents do not match the checksum "
                        "written with it"
                    )
                done += shard.tokens
                progress(done, whole)
        finally:
            threads.shutdown(cancel_futures=True)


def _digest(path: Path) -> str:
    try:
        return file_digest(path)
    except OSError as error:
        raise DataError(f"the shard {path} is missing or unreadable: {error.strerror or error}") from error
