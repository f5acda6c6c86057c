"""Language modelling as a task: windows of a corpus drawn on the device, judged in held-out bits per byte.

Any text, in bytes or in another tokenizer's tokens. Training draws windows at random places of the training part; the
figure at a context of L is over windows of L tokens of the held-out part, each read afresh. Contexts up to the task's
own length are taken from the front of the same windows, so that the bits at the places between two contexts are their
difference.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from longscan.errors import DataError
from longscan.tasks.corpus import Corpus
from longscan.tasks.sources import STDLIB
from longscan.tasks.task import BITS_PER_BYTE, Metric, Recipe, Task, uniform
from longscan.tasks.text import TextConfig, prepare
from longscan.tasks.tokenizers import BYTES, ByteTokenizer, Tokenizer
from longscan.tasks.watching import tell

# Scores that are held at once while testing.
_SCORES = 1 << 26


@dataclasses.dataclass(frozen=True)
class Language(Task):
    """The next token at every place.

    Args:
        length: tokens of a window.
        data, tokenizer, max_bytes: of the text, see :class:`longscan.tasks.text.TextConfig`.
        fraction: of its documents that is held out.
    """

    length: int = 2048
    data: str = STDLIB
    tokenizer: str = BYTES
    max_bytes: int | None = None
    fraction: float = 0.05

    name = "language"
    metric: ClassVar[Metric] = BITS_PER_BYTE
    axis = "context"
    recipe = Recipe(
        d_model=256,
        n_layer=8,
        learning_rate=3e-3,
        weight_decay=0.1,
        betas=(0.9, 0.95),
        warmup=100,
        schedule="cosine",
        floor=0.01,
    )

    @functools.cached_property
    def _text(self) -> tuple[Corpus, Tokenizer]:
        text = TextConfig(self.data, self.tokenizer, max_bytes=self.max_bytes, held_out=self.fraction)
        return prepare(text, progress=tell)

    @functools.cached_property
    def _on(self) -> dict[torch.device, tuple[Tensor, Tensor]]:
        return {}

    def tokens(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Training and held-out tokens on a device, one-dimensional integers; they stay there.

        Raises:
            DataError: the text or the tokenizer cannot be used, or a part is shorter than a window.
        """
        if device not in self._on:
            corpus, _ = self._text
            for name, part in (("training", corpus.train), ("held-out", corpus.held_out)):
                if len(part) <= self.length:
                    raise DataError(
                        f"the {name} part of {corpus.label} has {len(part):,} tokens, windows are of {self.length:,}; "
                        "give more text or a shorter length"
                    )
            dtype = np.uint8 if corpus.train.dtype == np.uint8 else np.int32
            train, rest = (
                torch.from_numpy(np.array(part, dtype)).to(device) for part in (corpus.train, corpus.held_out)
            )
            self._on[device] = train, rest
        return self._on[device]

    def to(self, device: torch.device) -> None:
        self.tokens(device)

    @property
    def vocabulary(self) -> int:
        # Bytes are known without reading the text.
        return ByteTokenizer.vocab_size if self.tokenizer == BYTES else self._text[1].vocab_size

    @property
    def held_out(self) -> int:
        return (len(self._text[0].held_out) - 1) // self.length

    @property
    def bytes_per_token(self) -> float:
        """Of the held-out text, borders between documents counted as tokens."""
        corpus, _ = self._text
        return corpus.held_out_bytes / len(corpus.held_out)

    def answers(self, length: int | None = None) -> int:
        return length or self.length

    @property
    def chance(self) -> float:
        """Bits per byte of taking every token for as likely as any other."""
        return math.log2(self.vocabulary) / self.bytes_per_token

    def sample(self, batch: int, generator: torch.Generator, length: int | None = None) -> tuple[Tensor, Tensor]:
        train, _ = self.tokens(generator.device)
        length = length or self.length
        starts = uniform(0, len(train) - length, (batch, 1), generator)
        return _windows(train, starts, length)

    def tests(
        self, length: int, sequences: int, batch: int, device: torch.device, seed: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The held-out part in windows, in order.

        Raises:
            DataError: it is shorter than one.
        """
        _, rest = self.tokens(device)
        stride = max(length, self.length)
        if len(rest) <= stride:
            raise DataError(f"context {length:,}: the held-out part has {len(rest):,} tokens; leave this context out")
        starts = stride * torch.arange((len(rest) - 1) // stride, device=device)[:, None]
        batch = max(1, min(batch, _SCORES // (length * self.vocabulary)))
        for some in starts.split(batch):
            yield _windows(rest, some, length)

    def judge(self, scores: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Bits, and the bytes that so many tokens are of on average."""
        nats = F.cross_entropy(scores.float().flatten(0, -2), targets.flatten(), reduction="sum")
        return nats / math.log(2), torch.full_like(nats, targets.numel() * self.bytes_per_token)


def _windows(tokens: Tensor, starts: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """``length`` tokens from each start (batch, 1), and what follows each of them."""
    both = tokens[starts + torch.arange(length + 1, device=tokens.device)].long()
    return both[:, :-1], both[:, 1:]
