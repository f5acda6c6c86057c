"""Spoken digits, a stand-in for SC09 (Warden 2018; Goel et al. 2022, arXiv 2202.09729): eSpeak NG says them.

Seven accents in thirteen variants each are the speakers; every one says every digit some times, at pitches and speeds
that are drawn. A fifth of the speakers is held out. The words begin anywhere in a recording, which has a little noise.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from longscan.errors import ArgumentError
from longscan.tasks.audio import LEVELS, Waveforms, from_mu_law, mu_law
from longscan.tasks.finite import FiniteTask, Split
from longscan.tasks.speech import Saying, speak
from longscan.tasks.task import ACCURACY, Metric, Recipe
from longscan.tasks.watching import telling
from longscan.tasks.windows import fitting

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

_ACCENTS = ("en", "en-us", "en-029", "en-gb-scotland", "en-gb-x-gbclan", "en-gb-x-gbcwmd", "en-gb-x-rp")
_VARIANTS = tuple([f"m{k}" for k in range(1, 9)] + [f"f{k}" for k in range(1, 6)])
#: Speakers, in the order in which every fifth is held out.
VOICES = tuple(f"{accent}+{variant}" for variant, accent in itertools.product(_VARIANTS, _ACCENTS))
_HELD_OUT = 5

# Drawn for every saying.
_PITCHES, _SPEEDS, _STRENGTHS = (20, 81), (130, 211), (0.3, 1.0)
#: Of a recording: about half a level of 256 near 0.
_NOISE = 1e-4


@dataclasses.dataclass(frozen=True)
class _SpokenDigits(FiniteTask):
    """What both tasks hear.

    Args:
        length: samples of a recording; what is longer is cut.
        rate: samples a second.
        takes: how often a speaker says each digit.
    """

    length: int = 16_000
    rate: int = 16_000
    takes: int = 4

    #: Samples of a recording beyond its length.
    _MORE: ClassVar[int] = 0

    def load(self) -> Split:
        random = np.random.default_rng(0)
        wanted = list(itertools.product(range(len(VOICES)), range(len(DIGITS)), range(self.takes)))
        sayings = [
            Saying(DIGITS[digit], VOICES[voice], int(random.integers(*_PITCHES)), int(random.integers(*_SPEEDS)))
            for voice, digit, _ in wanted
        ]
        recordings = np.empty((len(wanted), self.length + self._MORE), np.float32)
        for recording, said in zip(telling("speaking", recordings), speak(sayings, self.rate), strict=True):
            self._record(said, recording, random)
        # A part at a time: levels are of eight bytes until they are stored.
        levels = torch.cat([mu_law(some).byte() for some in torch.from_numpy(recordings).split(256)]).numpy()
        voices, digits, _ = np.array(wanted).T
        held_out = voices % _HELD_OUT == 0
        parts = (levels[~held_out], digits[~held_out], levels[held_out], digits[held_out])
        return Split(*(torch.from_numpy(part) for part in parts))

    def _record(self, said: np.ndarray, recording: np.ndarray, random: np.random.Generator) -> None:
        """Words somewhere in a recording, at a strength of their own."""
        said = random.uniform(*_STRENGTHS) * said[: len(recording)]
        begin = int(random.integers(0, len(recording) - len(said) + 1))
        recording[:] = _NOISE * random.standard_normal(len(recording))
        recording[begin : begin + len(said)] += said


@dataclasses.dataclass(frozen=True)
class SpokenDigitsStandin(_SpokenDigits, Waveforms):
    """The next sample at every place."""

    name: ClassVar[str] = "spoken_digits_standin"
    readout = "last"
    _MORE: ClassVar[int] = 1

    def sample(self, batch: int, generator: torch.Generator, length: int | None = None) -> tuple[Tensor, Tensor]:
        return self._shifted(super().sample(batch, generator)[0], length)

    def tests(
        self, length: int, sequences: int, batch: int, device: torch.device, seed: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """All held-out speakers' recordings, or so much from their beginning."""
        for levels, _ in super().tests(length, sequences, fitting(batch, length, LEVELS), device, seed):
            yield self._shifted(levels, length)

    def _shifted(self, levels: Tensor, length: int | None) -> tuple[Tensor, Tensor]:
        if length is not None and length > self.length:
            raise ArgumentError(f"{self.name}: recordings are of {self.length} samples, got length {length}")
        levels = levels[:, : (length or self.length) + 1].long()
        return levels[:, :-1], levels[:, 1:]


@dataclasses.dataclass(frozen=True)
class SpokenDigitsClassesStandin(_SpokenDigits):
    """Which digit is it? The samples as they are, from -1 to 1."""

    name: ClassVar[str] = "spoken_digits_classes_standin"
    recipe: ClassVar[Recipe] = Recipe(d_model=128, n_layer=4, steps=20_000, batch_size=16, learning_rate=4e-3)
    metric: ClassVar[Metric] = ACCURACY
    inputs = "values"
    readout = "pooled"

    @property
    def channels(self) -> int:
        return 1

    @property
    def outputs(self) -> int:
        return len(DIGITS)

    @property
    def chance(self) -> float:
        return 1 / len(DIGITS)

    def present(self, stored: Tensor, length: int | None = None) -> Tensor:
        return from_mu_law(stored)[..., None]
