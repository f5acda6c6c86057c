"""Waveforms, sample by sample: the next of 256 mu-law levels at every place (Goel et al. 2022, arXiv 2202.09729; Gu and
Dao 2023, section 4.4).

Recordings are the user's WAV files; the stand-in plays notes like a piano's by code.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from longscan.errors import ArgumentError, DataError
from longscan.nn.storage import write_atomically
from longscan.tasks.task import Metric, Recipe
from longscan.tasks.windows import NextToken, Windows, fitting, two_parts

# Partials of the highest note of the stand-in end at 3 kHz.
_LEAST_RATE = 6000

#: Of a sample, 8 bits.
LEVELS = 256
_MU = LEVELS - 1

#: As published figures of 8-bit audio are given ("bits per byte").
BITS_PER_SAMPLE = Metric("bits per sample", higher_is_better=False)

_RECIPE = Recipe(
    model="sashimi",
    d_model=64,
    n_layer=2,
    steps=100_000,
    batch_size=16,
    learning_rate=1e-3,
    weight_decay=0.1,
    warmup=10_000,
    schedule="cosine",
)


def mu_law(waveform: Tensor) -> Tensor:
    """Levels 0 .. 255 (int64) of samples from -1 to 1, finer near 0 (ITU-T G.711's curve, mu = 255)."""
    clipped = waveform.clamp(-1, 1)
    curved = clipped.sign() * (_MU * clipped.abs()).log1p() / math.log1p(_MU)
    return ((curved + 1) * (_MU / 2)).round().long()


def from_mu_law(levels: Tensor) -> Tensor:
    """Samples from -1 to 1 (float32) of levels."""
    curved = levels.float() * (2 / _MU) - 1
    return curved.sign() * (curved.abs() * math.log1p(_MU)).expm1() / _MU


def read_wav(path: Path, rate: int) -> np.ndarray:
    """Samples (float32, from -1 to 1) of a WAV file, channels averaged.

    Raises:
        DataError: it cannot be read, is sampled at another rate, or SciPy is not installed.
    """
    wavfile = _wavfile(path)
    try:
        found, samples = wavfile.read(path)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"data: cannot read {path}: {error}") from error
    if found != rate:
        raise DataError(
            f"data: {path} has {found} samples a second, the task {rate}; change its option `rate`, or the file: "
            f"ffmpeg -i {path.name} -ar {rate} -ac 1 new.wav"
        )
    if samples.dtype.kind == "u":
        samples = (samples.astype(np.float32) - 128) / 128
    elif samples.dtype.kind == "i":
        samples = samples / np.float32(-float(np.iinfo(samples.dtype).min))
    return (samples if samples.ndim == 1 else samples.mean(1)).astype(np.float32)


def write_wav(path: Path, waveform: Tensor, rate: int) -> Path:
    """Write samples (places,) from -1 to 1 as 16-bit WAV, atomically.

    Raises:
        DataError: SciPy is not installed.
        StorageError: the disk refused.
    """
    wavfile = _wavfile(path)
    samples = (waveform.clamp(-1, 1) * 32767).round().to(torch.int16).numpy()
    return write_atomically(path, lambda file: wavfile.write(file, rate, samples))


def _wavfile(path: Path):  # type: ignore[no-untyped-def]
    try:
        from scipy.io import wavfile
    except ImportError as error:
        raise DataError(
            f"data: {path} needs the package `scipy`; install it with: pip install 'longscan[experiments]'"
        ) from error
    return wavfile


@dataclasses.dataclass(frozen=True)
class Waveforms(NextToken):
    """What both tasks share.

    Args:
        length: samples.
        rate: samples a second.
    """

    length: int = 8192
    rate: int = 16_000

    recipe: ClassVar[Recipe] = _RECIPE
    metric: ClassVar[Metric] = BITS_PER_SAMPLE

    @property
    def vocabulary(self) -> int:
        return LEVELS

    @property
    def chance(self) -> float:
        return math.log2(LEVELS)

    def judge(self, scores: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        nats, count = super().judge(scores, targets)
        return nats / math.log(2), count


@dataclasses.dataclass(frozen=True)
class Audio(Waveforms):
    """The user's recordings; the last twentieth of every file is held out.

    Args:
        data: a WAV file, or a folder with any number of them.
    """

    data: str = "youtubemix"

    name: ClassVar[str] = "audio"

    @functools.cached_property
    def _on(self) -> dict[torch.device, tuple[Windows, Windows]]:
        return {}

    def windows(self, device: torch.device) -> tuple[Windows, Windows]:
        """To train on, and held out."""
        if device not in self._on:
            train, rest = two_parts(self._recordings)
            names = ("the part to train on", "the held-out part")
            both = [Windows([part], device, f"{self.name}: {n}") for n, part in zip(names, (train, rest), strict=True)]
            both[0].check(self.length + 1)
            self._on[device] = both[0], both[1]
        return self._on[device]

    @functools.cached_property
    def _recordings(self) -> list[np.ndarray]:
        path = Path(self.data).expanduser()
        files = sorted(path.rglob("*.wav")) if path.is_dir() else [path]
        if not files:
            raise DataError(f"data: no .wav file in {path}")
        return [mu_law(torch.from_numpy(read_wav(file, self.rate))).numpy().astype(np.uint8) for file in files]

    def to(self, device: torch.device) -> None:
        self.windows(device)

    def sample(self, batch: int, generator: torch.Generator, length: int | None = None) -> tuple[Tensor, Tensor]:
        windows, _ = self.windows(generator.device)[0].draw(batch, (length or self.length) + 1, generator)
        return windows[:, :-1], windows[:, 1:]

    def tests(
        self, length: int, sequences: int, batch: int, device: torch.device, seed: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """At most so many windows of the held-out part, evenly spaced.

        Raises:
            DataError: it is shorter than one.
        """
        rest = self.windows(device)[1]
        for windows, _ in rest.spread(sequences, length + 1, fitting(batch, length, LEVELS)):
            yield windows[:, :-1], windows[:, 1:]


@dataclasses.dataclass(frozen=True)
class NotesStandin(Waveforms):
    """Notes that are struck and die away, one on the other: partials of a stiff string, higher ones sooner gone.

    Args:
        notes: a second, on average.
    """

    notes: int = 6

    name: ClassVar[str] = "notes_standin"
    #: Pitches are of the white keys, two octaves from C3 on, which has so many Hz.
    _LOWEST: ClassVar[float] = 130.81
    _PARTIALS: ClassVar[int] = 6
    #: A partial's frequency over its number is off by half of this times the square of the number.
    _STIFFNESS: ClassVar[float] = 4e-4
    #: Seconds until the lowest partial is at 1/e.
    _DECAY: ClassVar[float] = 0.4
    #: Noise of a recording.
    _NOISE: ClassVar[float] = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rate < _LEAST_RATE:
            raise ArgumentError(f"notes_standin: rate must be at least {_LEAST_RATE}, got {self.rate}")

    def sample(self, batch: int, generator: torch.Generator, length: int | None = None) -> tuple[Tensor, Tensor]:
        levels = mu_law(self.play(batch, (length or self.length) + 1, generator))
        return levels[:, :-1], levels[:, 1:]

    def tests(
        self, length: int, sequences: int, batch: int, device: torch.device, seed: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        yield from super().tests(length, sequences, fitting(batch, length, LEVELS), device, seed)

    def play(self, batch: int, places: int, generator: torch.Generator) -> Tensor:
        """Waveforms (batch, places), drawn on the generator's device; at the start earlier notes still sound."""
        device = generator.device
        time = torch.arange(places, device=device) / self.rate
        partials = torch.arange(1, self._PARTIALS + 1, device=device)[:, None]
        stretch = partials * (1 + 0.5 * self._STIFFNESS * partials**2)
        earlier = 3 * self._DECAY
        seconds = places / self.rate + earlier
        waveform = self._NOISE * torch.randn(batch, places, generator=generator, device=device)
        for _ in range(max(1, round(self.notes * seconds))):
            octave, step, begin, strength = torch.rand(4, batch, 1, 1, generator=generator, device=device)
            # Semitones 0, 2, 4, 5, 7, 9, 11, without a table that would have to be on the device.
            note = 12 * (2 * octave).floor() + (((7 * step).floor() * 12 + 5) / 7).floor()
            frequency = self._LOWEST * 2 ** (note / 12)
            since = time - (begin * seconds - earlier)
            decay = torch.exp(-since.clamp(min=0) * partials / self._DECAY) / partials
            waves = (2 * math.pi * frequency * stretch * since).sin() * decay * (since >= 0)
            waveform = waveform + 0.15 * (0.3 + strength[..., 0]) * waves.sum(1)
        return waveform
