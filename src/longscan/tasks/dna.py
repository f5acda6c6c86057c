"""DNA, base by base: the next one, or the species that it is of (Gu and Dao 2023, section 4.3; HyenaDNA, Nguyen et al.
2023).

Genomes are the user's FASTA files, read whole. Either strand is as likely to be read as the other, so that in training
every second window is turned into its reverse complement. The last twentieth of every record is held out.
"""

from __future__ import annotations

import dataclasses
import functools
import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from longscan.errors import DataError
from longscan.tasks.task import IGNORED, PERPLEXITY, Metric, Recipe, Task
from longscan.tasks.windows import NextToken, Windows, fitting, two_parts

#: A token for each, in this order; whatever else a file has is an N.
BASES = "ACGTN"

_UNKNOWN = BASES.index("N")
_TOKEN_OF = np.full(256, _UNKNOWN, np.uint8)
for _token, _base in enumerate(BASES):
    _TOKEN_OF[[ord(_base), ord(_base.lower())]] = _token

#: Of the paper's pretraining, at its smallest size that it scales the length of.
DNA_RECIPE = Recipe(
    d_model=128,
    n_layer=12,
    steps=20_000,
    batch_size=128,
    learning_rate=8e-3,
    weight_decay=0.1,
    betas=(0.9, 0.95),
    warmup=2000,
    schedule="cosine",
)


def read_fasta(path: Path) -> list[np.ndarray]:
    """Tokens (uint8) of the records of a FASTA file, which may be compressed by gzip.

    Raises:
        DataError: it cannot be read, has no record, or Biopython is not installed.
    """
    try:
        from Bio.SeqIO.FastaIO import SimpleFastaParser
    except ImportError as error:
        raise DataError(
            "data: FASTA files need the package `biopython`; install it with: pip install 'longscan[experiments]'"
        ) from error
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="latin-1") as file:
            records = [encode(bases) for _, bases in SimpleFastaParser(file)]
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"data: cannot read {path}: {error}") from error
    if not sum(map(len, records)):
        raise DataError(f"data: {path} has no bases; a FASTA file has lines >NAME, each with bases below it")
    return records


def encode(bases: str) -> np.ndarray:
    """Tokens (uint8) of bases in either case."""
    return _TOKEN_OF[np.frombuffer(bases.encode("latin-1"), np.uint8)]


def reverse_complement(tokens: Tensor) -> Tensor:
    """The other strand of (..., places), read in its own direction: A and T change places, C and G too."""
    return (3 - tokens.flip(-1)) % len(BASES)


def letters(tokens: Tensor) -> str:
    """The bases of tokens (places,), as they are written."""
    return "".join(BASES[token] for token in tokens.tolist())


@dataclasses.dataclass(frozen=True)
class _Genomes(Task):
    """What both tasks read.

    Args:
        length: bases.
        data: FASTA files, with commas between.
        strands: whether windows to train on may be of the other strand.
    """

    length: int = 1024
    data: str = ""
    strands: bool = True

    recipe: ClassVar[Recipe] = DNA_RECIPE

    @property
    def files(self) -> list[str]:
        return [file.strip() for file in self.data.split(",")]

    @property
    def vocabulary(self) -> int:
        return len(BASES)

    def words(self, tokens: Tensor) -> str:
        return letters(tokens)

    @functools.cached_property
    def _tokens(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Of each file the part to train on and the held-out one; an N ends each piece of a record."""
        end = np.array([_UNKNOWN], np.uint8)
        found = []
        for file in self.files:
            pieces = [two_parts([record]) for record in read_fasta(Path(file).expanduser())]
            train, rest = (np.concatenate([np.append(piece[k], end) for piece in pieces]) for k in (0, 1))
            found.append((train, rest))
        return found

    def _parts(self, index: int) -> list[np.ndarray]:
        return [parts[index] for parts in self._tokens]

    @functools.cached_property
    def _on(self) -> dict[torch.device, tuple[Windows, Windows]]:
        return {}

    def windows(self, device: torch.device) -> tuple[Windows, Windows]:
        """To train on, and held out."""
        if device not in self._on:
            names = (f"{self.name}: the part to train on", f"{self.name}: the held-out part")
            train, rest = (Windows(self._parts(k), device, names[k]) for k in (0, 1))
            train.check(self.length + 1)
            self._on[device] = train, rest
        return self._on[device]

    def to(self, device: torch.device) -> None:
        self.windows(device)

    def _draw(self, batch: int, places: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        windows, species = self.windows(generator.device)[0].draw(batch, places, generator)
        if self.strands:
            other = torch.rand(batch, 1, generator=generator, device=generator.device) < 0.5
            windows = torch.where(other, reverse_complement(windows), windows)
        return windows, species


@dataclasses.dataclass(frozen=True)
class DNA(_Genomes, NextToken):
    """The next base at every place, in perplexity; an N is not asked for."""

    data: str = "hg38.ml.fa.gz"

    name: ClassVar[str] = "dna"
    metric: ClassVar[Metric] = PERPLEXITY

    def _parts(self, index: int) -> list[np.ndarray]:
        # Long genomes are drawn from more often: all places are as likely.
        return [np.concatenate(super()._parts(index))]

    @property
    def chance(self) -> float:
        return 4.0

    def sample(self, batch: int, generator: torch.Generator, length: int | None = None) -> tuple[Tensor, Tensor]:
        return shifted(self._draw(batch, (length or self.length) + 1, generator)[0])

    def tests(
        self, length: int, sequences: int, batch: int, device: torch.device, seed: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """At most so many windows of the held-out part, evenly spaced.

        Raises:
            DataError: it is shorter than one.
        """
        rest = self.windows(device)[1]
        for windows, _ in rest.spread(sequences, length + 1, fitting(batch, length, self.vocabulary)):
            yield shifted(windows)


@dataclasses.dataclass(frozen=True)
class DNASpecies(_Genomes):
    """Which of the species is it of? One file is one species."""

    data: str = "human.fna.gz,chimpanzee.fna.gz,gorilla.fna.gz,orangutan.fna.gz,bonobo.fna.gz"

    name: ClassVar[str] = "dna_species"
    readout = "pooled"

    @property
    def outputs(self) -> int:
        return len(self.files)

    @property
    def chance(self) -> float:
        return 1 / self.outputs

    def sample(self, batch: int, generator: torch.Generator, length: int | None = None) -> tuple[Tensor, Tensor]:
        return self._draw(batch, length or self.length, generator)

    def tests(
        self, length: int, sequences: int, batch: int, device: torch.device, seed: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """As many windows of each species' held-out part, evenly spaced.

        Raises:
            DataError: one is shorter than a window.
        """
        yield from self.windows(device)[1].spread(sequences, length, batch)


def shifted(windows: Tensor) -> tuple[Tensor, Tensor]:
    """What is read, and what follows each of it; an N is not asked for."""
    return windows[:, :-1], windows[:, 1:].masked_fill(windows[:, 1:] == _UNKNOWN, IGNORED)
