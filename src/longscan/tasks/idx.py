"""IDX files, the format of MNIST: a header of type and shape, then the numbers, big-endian; often gzipped."""

from __future__ import annotations

import gzip
import math
from pathlib import Path

import numpy as np

from longscan.errors import DataError

_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def read_idx(path: Path) -> np.ndarray:
    """The array of a file, gzipped or not, in the machine's byte order.

    Raises:
        DataError: the file cannot be read, is no IDX file, or is cut short.
    """
    try:
        content = path.read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
    except (OSError, EOFError) as error:
        raise DataError(f"data: cannot read {path}: {error}") from error
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] not in _TYPES:
        raise DataError(f"data: {path} is no IDX file: it begins with {content[:4].hex(' ')}")
    kind, axes = np.dtype(_TYPES[content[2]]), content[3]
    begin = 4 + 4 * axes
    shape = np.frombuffer(content[4:begin].ljust(4 * axes, b"\0"), ">u4").tolist()
    wanted = begin + math.prod(shape) * kind.itemsize
    if len(content) != wanted:
        raise DataError(f"data: {path} has {len(content)} bytes, its header says {wanted} (shape {tuple(shape)})")
    return np.frombuffer(content, kind, offset=begin).reshape(shape).astype(kind.newbyteorder("="))


def find_idx(folder: Path, name: str) -> Path:
    """The file of a name in a folder or below it, as MNIST's are spelt: with "-" or "." before "idx", and ".gz" or not.

    Raises:
        DataError: there is none.
    """
    spellings = [spelt + end for spelt in (name, name.replace("-idx", ".idx")) for end in ("", ".gz")]
    for spelt in spellings:
        for path in sorted(folder.rglob(spelt)):
            return path
    raise DataError(f"data: no {name} (or {', '.join(spellings[1:])}) in {folder}")
