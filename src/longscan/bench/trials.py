"""What `longscan compare` trains models on: a batch for every step, a loss, and how well a model does in the end."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longscan.errors import ArgumentError
from longscan.evaluation.held_out import bits_per_byte, stream_nats
from longscan.models import LanguageModel
from longscan.tasks.registry import SYNTHETIC
from longscan.tasks.task import Task
from longscan.tasks.text import TextConfig, prepare
from longscan.training import Batches

TEXT = "text"
NAMES = (TEXT, *SYNTHETIC)

#: Where a task's own length, a paper's, is too long for a short run: the one that is used unless another is asked for.
_LENGTHS = {TEXT: 256, "selective_copying": 256, "copying": 256}

#: Held-out tokens at most that text is judged by, and sequences that a synthetic task is.
_HELD_OUT, _SEQUENCES = 2**17, 512


class Trial(abc.ABC):
    """Data and its judge; every model sees the same batches."""

    #: What :meth:`quality` is, in words.
    metric: str
    higher_is_better: bool
    vocab_size: int
    #: Tokens of a sequence.
    places: int

    @abc.abstractmethod
    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Tokens and targets of a step, on the device: a function of the seed and the step alone."""

    @abc.abstractmethod
    def loss(self, model: LanguageModel, tokens: Tensor, targets: Tensor) -> Tensor:
        """The mean loss in nats."""

    @abc.abstractmethod
    def quality(self, model: LanguageModel) -> float:
        """How well the model does on data it has not been trained on."""

    def describe(self) -> dict[str, Any]:
        """What a result says of the data."""
        return {"metric": self.metric, "vocab_size": self.vocab_size, "places": self.places}


class Text(Trial):
    """The text of `longscan train`, in held-out bits per byte."""

    metric = "bits per byte"
    higher_is_better = False

    def __init__(self, length: int, batch_size: int, seed: int, device: str, config: TextConfig | None = None) -> None:
        self._corpus, tokenizer = prepare(config or TextConfig())
        self.vocab_size, self.places, self._device = tokenizer.vocab_size, length, device
        self._batches = Batches(self._corpus.train, batch_size, length, seed)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        tokens, targets = self._batches.batch(step)
        return tokens.to(self._device), targets.to(self._device)

    def loss(self, model: LanguageModel, tokens: Tensor, targets: Tensor) -> Tensor:
        return model.loss(tokens, targets)

    def quality(self, model: LanguageModel) -> float:
        held_out = self._corpus.held_out
        tokens = held_out[:_HELD_OUT]
        size = self._corpus.held_out_bytes * len(tokens) / len(held_out)
        return bits_per_byte(stream_nats(model, tokens), round(size))

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "corpus": self._corpus.describe()}


@dataclass
class Synthetic(Trial):
    """A synthetic task, in accuracy over its answers."""

    task: Task
    batch_size: int
    seed: int
    device: str

    metric = "accuracy"
    higher_is_better = True

    def __post_init__(self) -> None:
        self.vocab_size = self.task.vocabulary
        self.places = self.batch(0)[0].shape[1]

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        return self._draw(self.batch_size, 2 * step)

    def loss(self, model: LanguageModel, tokens: Tensor, targets: Tensor) -> Tensor:
        return self.task.loss(self._scores(model, tokens, targets), targets)

    @torch.no_grad()
    def quality(self, model: LanguageModel) -> float:
        right = asked = 0
        for part in range(-(-_SEQUENCES // self.batch_size)):
            tokens, targets = self._draw(self.batch_size, 2 * part + 1)
            one, other = self.task.judge(self._scores(model, tokens, targets), targets)
            right, asked = right + int(one), asked + int(other)
        return right / asked

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "length": self.task.length, "chance": self.task.chance}

    def _draw(self, count: int, number: int) -> tuple[Tensor, Tensor]:
        # Training draws even numbers, the judge odd ones.
        generator = torch.Generator(self.device).manual_seed((self.seed << 32) + number)
        return self.task.sample(count, generator)

    def _scores(self, model: LanguageModel, tokens: Tensor, targets: Tensor) -> Tensor:
        hidden, _ = model.backbone(tokens)
        return model.head(hidden[:, -targets.shape[1] :])


def make_trial(name: str, length: int | None, batch_size: int, seed: int, device: str) -> Trial:
    """The trial of a task's name.

    Args:
        name: "text", or a key of :data:`longscan.tasks.registry.SYNTHETIC`.
        length: None: 256, or the task's own where that is not of thousands.
        batch_size, seed, device: of the batches.

    Raises:
        ArgumentError: there is no such task, or a length that it does not take.
    """
    if name not in NAMES:
        raise ArgumentError(f"task: got {name!r}; allowed are {', '.join(NAMES)}")
    length = _LENGTHS.get(name) if length is None else length
    if name == TEXT:
        return Text(length or _LENGTHS[TEXT], batch_size, seed, device)
    options = {} if length is None else {"length": length}
    return Synthetic(SYNTHETIC[name](**options), batch_size, seed, device)
