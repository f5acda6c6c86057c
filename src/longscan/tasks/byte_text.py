"""Byte text of the Long Range Arena: is a review kind? do two papers cite each other? (Tay et al. 2021)

The sets are the user's: reviews of IMDb (Maas et al. 2011), pairs of the ACL Anthology Network (Radev et al. 2013).
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from longscan.errors import DataError
from longscan.tasks.finite import FiniteTask, Split
from longscan.tasks.labelled_text import PADDING, pack, read_rows
from longscan.tasks.task import Recipe


@dataclasses.dataclass(frozen=True)
class Bytes(FiniteTask):
    """The class of a text, or of :attr:`texts` side by side, stored as uint8 and read byte by byte.

    Args:
        length: bytes that are read of each text, from its beginning.
    """

    readout = "pooled"
    #: That a sequence is made of.
    texts: ClassVar[int] = 1

    @property
    def vocabulary(self) -> int:
        return 256

    @property
    def outputs(self) -> int:
        return 2

    @property
    def chance(self) -> float:
        return 1 / self.outputs

    def lengths(self, inputs: Tensor) -> Tensor:
        """(batch,), or (batch, texts) for several."""
        return (inputs.unflatten(1, (self.texts, -1)) != PADDING).sum(dim=-1).squeeze(1)

    def words(self, tokens: Tensor) -> str:
        """Several texts have a line between them."""
        parts = (bytes(part).rstrip(b"\0") for part in tokens.unflatten(0, (self.texts, -1)).tolist())
        return "\n".join(part.decode("utf-8", errors="replace") for part in parts)

    def present(self, stored: Tensor, length: int | None = None) -> Tensor:
        return stored.long()


@dataclasses.dataclass(frozen=True)
class ByteText(Bytes):
    """The class of a text, read byte by byte.

    Args:
        length: bytes that are read of a text, from its beginning.
        data: "hf:NAME", a set of the Hub with the columns text and label; or a folder with train.tsv and test.tsv
            (class, tab, text), with train.jsonl and test.jsonl (fields label and text), or with train/ and test/ that
            have a folder of .txt files for each class, such as the reviews' own.
        classes: how many there are.
    """

    length: int = 4000
    data: str = "hf:stanfordnlp/imdb"
    classes: int = 2

    name: ClassVar[str] = "byte_text"
    recipe: ClassVar[Recipe] = Recipe(d_model=256, n_layer=6, steps=50_000, batch_size=16, learning_rate=1e-2)
    columns: ClassVar[tuple[str, ...]] = ("text",)
    tsv_columns: ClassVar[tuple[int, ...]] = (1,)

    @property
    def outputs(self) -> int:
        return self.classes

    def load(self) -> Split:
        tensors: list[Tensor] = []
        for part in ("train", "test"):
            rows = read_rows(self.data, part, self.columns, self.tsv_columns)
            packed, classes = pack(rows, self.texts, self.length)
            if not len(classes):
                raise DataError(f"data: the {part} part of {self.data} is empty")
            if not 0 <= classes.min() <= classes.max() < self.outputs:
                raise DataError(
                    f"data: {self.data}, {part}: classes must be 0 .. {self.outputs - 1}, got {classes.min()} to "
                    f"{classes.max()}"
                )
            tensors += [torch.from_numpy(packed), torch.from_numpy(classes)]
        return Split(*tensors)


@dataclasses.dataclass(frozen=True)
class Retrieval(ByteText):
    """Whether two texts belong together: each is read by itself, by the same model (its option ``pair``).

    Args:
        length: bytes that are read of each text.
        data: a folder with train.tsv and test.tsv, or names that end so (class, two identifiers, two texts, as the
            Arena's new_aan_pairs.train.tsv); with train.jsonl and test.jsonl (fields label, text1, text2); or
            "hf:NAME", a set of the Hub with such columns.
    """

    length: int = 4000
    data: str = "aan"

    name: ClassVar[str] = "retrieval"
    recipe: ClassVar[Recipe] = Recipe(
        d_model=256, n_layer=6, steps=90_000, batch_size=32, learning_rate=1e-2, model_options={"pair": True}
    )
    texts: ClassVar[int] = 2
    columns: ClassVar[tuple[str, ...]] = ("text1", "text2")
    tsv_columns: ClassVar[tuple[int, ...]] = (3, 4)
