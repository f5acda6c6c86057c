"""Synthetic species, a stand-in for genomes: what can be known of them is known exactly.

Each species draws its bases from a Markov chain of its own, a little off a common one. Each has a marker, a short word;
after it, what followed the marker the last time is repeated, with mutations: a dependence as long as the way between
two markers, hundreds of bases. All of it is a rule for the next base given those before, so that a sequence's
probability under each species can be computed, and with it the best possible figures: the perplexity of the mixture of
all species, and how often the likeliest species is the right one.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from longscan.errors import ArgumentError
from longscan.ops.jit import kernel
from longscan.tasks.dna import BASES, DNA_RECIPE, letters, shifted
from longscan.tasks.task import PERPLEXITY, Metric, Recipe, Task, uniform
from longscan.tasks.watching import telling
from longscan.tasks.windows import NextToken, fitting


@dataclasses.dataclass(frozen=True)
class Species:
    """The rule by which the next base of a species is drawn.

    Args:
        chances: (4^order, 4) probability of each base after the bases before it; before the first stands an A.
        marker: its bases.
        repeat: how many bases after a marker repeat those after the last one.
        mutation: how likely a repeated base is drawn from all four instead.
    """

    chances: np.ndarray
    marker: tuple[int, ...]
    repeat: int = 32
    mutation: float = 0.05

    def draw(self, sequences: np.ndarray, random: np.random.Generator) -> None:
        """Write sequences of this species into uint8 (count, length)."""
        for row in telling("drawing sequences", sequences):
            self._walk(row, random.random(len(row)))

    def log_likelihood(self, sequences: np.ndarray) -> np.ndarray:
        """(count,) log-probability of each of uint8 (count, length), in nats."""
        return np.array([self._walk(row, np.empty(0)) for row in telling("weighing sequences", sequences)])

    def _walk(self, row: np.ndarray, draws: np.ndarray) -> float:
        marker = functools.reduce(lambda word, base: 4 * word + base, self.marker)
        return float(_walk(row, draws, self.chances, marker, len(self.marker), self.repeat, self.mutation))


@kernel
def _walk(row, draws, chances, marker, length_of_marker, repeat, mutation):  # type: ignore[no-untyped-def]
    """Log-probability of a sequence, which is written first if there are numbers of [0, 1) to draw it by."""
    contexts, words = len(chances), 4**length_of_marker
    context = word = left = source = after_marker = 0
    total = 0.0
    here = np.empty(4)
    for place in range(len(row)):
        repeating = left > 0
        for base in range(4):
            here[base] = chances[context, base]
            if repeating:
                here[base] = mutation / 4 + (1 - mutation) * (row[source] == base)
        if len(draws):
            base, below = 0, here[0]
            while base < 3 and draws[place] >= below:
                base += 1
                below += here[base]
            row[place] = base
        base = np.int64(row[place])
        total += np.log(here[base])
        context = (4 * context + base) % contexts
        word = (4 * word + base) % words
        if repeating:
            left -= 1
            source += 1
        elif word == marker and place + 1 >= length_of_marker:
            # A marker that ends within a repeat starts none: repeats would have no end.
            if after_marker:
                left, source = repeat, after_marker
            after_marker = place + 1
    return total


@functools.cache
def synthetic_species(count: int) -> tuple[Species, ...]:
    """The first ``count`` species, always the same."""
    random = np.random.default_rng(0)
    common = 0.8 * random.standard_normal((4**_ORDER, 4))
    species = []
    for _ in range(count):
        scores = np.exp(common + _OFF * random.standard_normal(common.shape))
        marker = tuple(int(base) for base in random.integers(0, 4, _MARKER))
        species.append(Species(scores / scores.sum(1, keepdims=True), marker))
    return tuple(species)


# Bases that the chain looks back, how far chains are off the common one (in nats), and bases of a marker.
_ORDER, _OFF, _MARKER = 2, 0.15, 4


@dataclasses.dataclass(frozen=True)
class _Standin(Task):
    """What both tasks draw.

    Args:
        length: bases.
        species: how many.
        sequences: to train on; tests draw others.
    """

    length: int = 1024
    species: int = 5
    sequences: int = 16_384

    recipe: ClassVar[Recipe] = DNA_RECIPE
    #: Bases of a sequence beyond its length.
    _MORE: ClassVar[int] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.species < 2:
            raise ArgumentError(f"{self.name}: species must be at least 2, got {self.species}")

    @property
    def vocabulary(self) -> int:
        return len(BASES)

    def words(self, tokens: Tensor) -> str:
        return letters(tokens)

    @functools.cached_property
    def _on(self) -> dict[torch.device, tuple[Tensor, Tensor]]:
        return {}

    def _train(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._on:
            bases, classes = self._made(self.length, self.sequences, 0)
            self._on[device] = torch.from_numpy(bases).to(device), torch.from_numpy(classes).to(device)
        return self._on[device]

    def to(self, device: torch.device) -> None:
        self._train(device)

    def _made(self, length: int, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Sequences and the species that each is of, as many of every one."""
        random = np.random.default_rng(seed)
        classes = np.arange(count) % self.species
        bases = np.empty((count, length + self._MORE), np.uint8)
        for index, species in enumerate(synthetic_species(self.species)):
            own = bases[classes == index]
            species.draw(own, random)
            bases[classes == index] = own
        return bases, classes

    def _held_out(self, length: int, sequences: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        return self._made(length, sequences, seed + (1 << 32))

    def _drawn(self, batch: int, generator: torch.Generator, length: int | None) -> tuple[Tensor, Tensor]:
        bases, classes = self._train(generator.device)
        if length is not None and length > self.length:
            raise ArgumentError(f"{self.name}: sequences to train on are of {self.length} bases, got length {length}")
        drawn = uniform(0, len(bases), (batch,), generator)
        return bases[drawn, : (length or self.length) + self._MORE].long(), classes[drawn]

    def _log_likelihoods(self, bases: np.ndarray) -> np.ndarray:
        """(count, species) of sequences under each."""
        return np.stack([one.log_likelihood(bases) for one in synthetic_species(self.species)], axis=1)


@dataclasses.dataclass(frozen=True)
class DNAStandin(_Standin, NextToken):
    """The next base at every place, in perplexity."""

    name: ClassVar[str] = "dna_standin"
    metric: ClassVar[Metric] = PERPLEXITY
    _MORE: ClassVar[int] = 1

    @property
    def chance(self) -> float:
        return 4.0

    def sample(self, batch: int, generator: torch.Generator, length: int | None = None) -> tuple[Tensor, Tensor]:
        return shifted(self._drawn(batch, generator, length)[0])

    def tests(
        self, length: int, sequences: int, batch: int, device: torch.device, seed: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        bases = torch.from_numpy(self._held_out(length, sequences, seed)[0])
        for some in bases.split(fitting(batch, length, self.vocabulary)):
            yield shifted(some.to(device).long())

    def best(self, length: int, sequences: int, seed: int) -> float:
        """Of the mixture of all species, which is what the sequences are drawn from."""
        bases, _ = self._held_out(length, sequences, seed)
        mixtures = (np.logaddexp.reduce(self._log_likelihoods(part), axis=1) for part in (bases, bases[:, :1]))
        whole, first = mixtures
        return math.exp(-float((whole - first).mean()) / length)


@dataclasses.dataclass(frozen=True)
class DNASpeciesStandin(_Standin):
    """Which of the species is it of?"""

    name: ClassVar[str] = "dna_species_standin"
    readout = "pooled"

    @property
    def outputs(self) -> int:
        return self.species

    @property
    def chance(self) -> float:
        return 1 / self.species

    def sample(self, batch: int, generator: torch.Generator, length: int | None = None) -> tuple[Tensor, Tensor]:
        return self._drawn(batch, generator, length)

    def tests(
        self, length: int, sequences: int, batch: int, device: torch.device, seed: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        bases, classes = (torch.from_numpy(array) for array in self._held_out(length, sequences, seed))
        for some, theirs in zip(bases.split(batch), classes.split(batch), strict=True):
            yield some.to(device).long(), theirs.to(device)

    def best(self, length: int, sequences: int, seed: int) -> float:
        """How often the likeliest species is the right one."""
        bases, classes = self._held_out(length, sequences, seed)
        return float((self._log_likelihoods(bases).argmax(1) == classes).mean())
