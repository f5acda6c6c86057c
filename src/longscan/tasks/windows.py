"""Windows of long recordings of anything: drawn at random places to train on, evenly spaced to test on."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from longscan.errors import DataError
from longscan.tasks.task import IGNORED, Task, uniform

#: Of each recording, at its end.
HELD_OUT = 0.05

# Scores that are held at once while testing.
_SCORES = 1 << 26


@dataclasses.dataclass(frozen=True)
class NextToken(Task):
    """The next token at every place; :meth:`judge` gives nats and how many tokens they are of."""

    def answers(self, length: int | None = None) -> int:
        return length or self.length

    def judge(self, scores: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        nats = F.cross_entropy(scores.float().flatten(0, -2), targets.flatten(), ignore_index=IGNORED, reduction="sum")
        return nats, (targets != IGNORED).sum()


class Windows:
    """Tokens of several classes on a device.

    Args:
        parts: of each class, one-dimensional uint8.
        device: where they lie.
        what: they are, in errors.
    """

    def __init__(self, parts: Sequence[np.ndarray], device: torch.device, what: str) -> None:
        self.what = what
        self.counts = [len(part) for part in parts]
        self._tokens = torch.from_numpy(np.concatenate(parts)).to(device)
        self._counts = torch.tensor(self.counts, device=device)
        self._begins = self._counts.cumsum(0) - self._counts

    def check(self, places: int) -> None:
        """Raise DataError if a class is shorter than a window."""
        if min(self.counts) < places:
            raise DataError(
                f"{self.what} has {min(self.counts):,} places, windows are of {places:,}; give more data or a shorter "
                "length"
            )

    def draw(self, batch: int, places: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Windows (batch, places) int64 from anywhere, and their classes (batch,), each as likely as another."""
        classes = uniform(0, len(self.counts), (batch,), generator)
        # A range of its own for each class, without a wait: next to 2^62 the uneven end of a remainder is nothing.
        anywhere = uniform(0, 1 << 62, (batch,), generator) % (self._counts[classes] - places + 1)
        return self._cut(self._begins[classes] + anywhere, places), classes

    def spread(self, count: int, places: int, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of windows as :meth:`draw` gives them, evenly spaced: of each class its share of ``count``, or as
        many as there are without overlap.

        Raises:
            DataError: a class is shorter than a window.
        """
        self.check(places)
        device = self._tokens.device
        starts, classes = [], []
        for index, total in enumerate(self.counts):
            number = min(-(-count // len(self.counts)), total // places)
            first = torch.arange(number, device=device) * ((total - places) // max(1, number - 1))
            starts.append(self._begins[index] + first)
            classes.append(torch.full_like(first, index))
        for some, theirs in zip(torch.cat(starts).split(batch), torch.cat(classes).split(batch), strict=True):
            yield self._cut(some, places), theirs

    def _cut(self, starts: Tensor, places: int) -> Tensor:
        return self._tokens[starts[:, None] + torch.arange(places, device=starts.device)].long()


def two_parts(recordings: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """What comes first of every recording, and the last twentieth of every one; each part as one array."""
    ends = [len(recording) - round(HELD_OUT * len(recording)) for recording in recordings]
    pairs = list(zip(recordings, ends, strict=True))
    return np.concatenate([r[:end] for r, end in pairs]), np.concatenate([r[end:] for r, end in pairs])


def fitting(batch: int, length: int, vocabulary: int) -> int:
    """How many sequences' scores of every place fit in memory together, at most ``batch``."""
    return max(1, min(batch, _SCORES // (length * vocabulary)))
