"""Grey images, pixel by pixel: CIFAR-10 without its colours (Krizhevsky 2009), as in the Long Range Arena."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from longscan.errors import DataError
from longscan.tasks.finite import Split
from longscan.tasks.hub import HUB, from_hub
from longscan.tasks.pixels import PixelTask
from longscan.tasks.task import Recipe

_SIDE = 32
# A record of the binary version: a class, then a plane of each colour.
_RECORD = 1 + 3 * _SIDE * _SIDE
# ITU-R BT.601
_LUMA = (0.299, 0.587, 0.114)


@dataclasses.dataclass(frozen=True)
class GreyImages(PixelTask):
    """A brightness from -1 to 1 at each place, row by row; ten classes.

    Args:
        length: pixels of an image; CIFAR-10's are 32 x 32.
        data: "hf:NAME", a set of the Hub with the columns img and label; or the folder of the binary version, with
            data_batch_1.bin to data_batch_5.bin and test_batch.bin. The Python version is not read: it would have to
            be unpickled.
    """

    length: int = 1024
    data: str = "hf:uoft-cs/cifar10"

    name: ClassVar[str] = "grey_images"
    recipe: ClassVar[Recipe] = Recipe(d_model=512, n_layer=6, steps=200_000, batch_size=50, learning_rate=1e-2)

    @property
    def outputs(self) -> int:
        return 10

    def load(self) -> Split:
        tensors: list[Tensor] = []
        for part in ("train", "test"):
            colours, classes = read_colours(self.data, part)
            if colours.shape[1:] != (_SIDE, _SIDE, 3) or self.length != _SIDE * _SIDE:
                raise DataError(
                    f"data: {self.data}, {part}: images must be {_SIDE} x {_SIDE} x 3 and length {_SIDE * _SIDE}, "
                    f"got {colours.shape[1:]} and length {self.length}"
                )
            grey = np.rint(colours @ np.array(_LUMA, np.float32)).astype(np.uint8)
            tensors += [torch.from_numpy(grey.reshape(len(grey), -1)), torch.from_numpy(classes.astype(np.int64))]
        return Split(*tensors)


def read_colours(data: str, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (count, 32, 32, 3) uint8 and classes (count,) of a part, "train" or "test".

    Raises:
        DataError: it cannot be read, or the package that reads it is not installed.
    """
    if data.startswith(HUB):
        return from_hub(
            data, part, lambda rows: (np.stack([np.asarray(i) for i in rows["img"]]), np.asarray(rows["label"]))
        )
    folder = Path(data).expanduser()
    paths = sorted(folder.glob("data_batch_*.bin" if part == "train" else "test_batch.bin"))
    if not paths:
        raise DataError(f"data: {data!r} has no {part} part; give a folder with data_batch_*.bin and test_batch.bin")
    records = []
    for path in paths:
        content = np.fromfile(path, np.uint8)
        if not len(content) or len(content) % _RECORD:
            raise DataError(f"data: {path} has {len(content):,} bytes, which are no records of {_RECORD:,}")
        records.append(content.reshape(-1, _RECORD))
    table = np.concatenate(records)
    if table[:, 0].max() > 9:
        raise DataError(f"data: {folder}: classes must be 0 .. 9, got {table[:, 0].max()}")
    return table[:, 1:].reshape(-1, 3, _SIDE, _SIDE).transpose(0, 2, 3, 1), table[:, 0]
