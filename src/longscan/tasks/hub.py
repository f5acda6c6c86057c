"""Data sets of the Hugging Face Hub, through the package `datasets`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from longscan.errors import DataError

#: What the name of a set begins with, where files could be named too.
HUB = "hf:"

T = TypeVar("T")


def from_hub(data: str, part: str, read: Callable[[Any], T]) -> T:
    """What ``read`` makes of a part ("train", "test") of the set that ``data``, "hf:NAME", names.

    Raises:
        DataError: the package is not installed, or the set cannot be had, or is not as ``read`` expects.
    """
    name = data.removeprefix(HUB)
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"data: {data} needs the package `datasets`; install it with: pip install 'longscan[hub]'"
        ) from error
    try:
        return read(datasets.load_dataset(name, split=part))
    except Exception as error:  # datasets raises errors of many kinds: connection, parsing, unknown names
        raise DataError(f"data: cannot read the data set {name!r}: {error}") from error
