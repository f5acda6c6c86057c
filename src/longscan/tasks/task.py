"""What a synthetic task is: data drawn on the device, where the answers stand, how they are judged, and a recipe."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from longscan.errors import ArgumentError

#: Targets with this value do not count, as in PyTorch's cross-entropy.
IGNORED = -100


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A small model and how it is trained.

    Args:
        d_model, n_layer, d_intermediate, mixer_options, block, block_options: of the model, see
            :class:`longscan.LanguageModelConfig`.
        steps, batch_size: of training; every batch is drawn afresh.
        learning_rate: constant, after ``warmup`` steps of linear rise.
        weight_decay: of AdamW, on matrices.
        clip: largest norm of the gradient; 0 leaves it as it is.
        precision: "float32", or "bfloat16" (autocast).
    """

    d_model: int = 64
    n_layer: int = 2
    d_intermediate: int = 0
    mixer_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    block: str = "plain"
    block_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    steps: int = 1000
    batch_size: int = 32
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    warmup: int = 0
    clip: float = 1.0
    precision: Literal["float32", "bfloat16"] = "float32"


@dataclasses.dataclass(frozen=True)
class Task(abc.ABC):
    """A task over token sequences, with endless data and answers at the last places.

    A model reads ``tokens`` (batch, places) and is asked at the last ``answers(length)`` of them.

    Args:
        length: what the task calls its length; see :meth:`sample`.
    """

    length: int

    name: ClassVar[str]
    #: The recipe at the scale of the paper that the task is from.
    recipe: ClassVar[Recipe]

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type in (int, "int") and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ArgumentError(f"{self.name}: {field.name} must be an integer of at least 1, got {value!r}")

    @property
    @abc.abstractmethod
    def vocabulary(self) -> int:
        """Number of tokens; tokens and targets are ``0 .. vocabulary - 1``."""

    @abc.abstractmethod
    def answers(self, length: int | None = None) -> int:
        """At how many of the last places answers may be asked."""

    @abc.abstractmethod
    def sample(self, batch: int, generator: torch.Generator, length: int | None = None) -> tuple[Tensor, Tensor]:
        """Draw sequences.

        All on the generator's device, without waiting for it: the call can be captured in a CUDA graph that knows the
        generator.

        Args:
            batch: number of sequences.
            generator: source of all that is random.
            length: instead of the task's own.

        Returns:
            tokens (batch, places) int64 and targets (batch, answers) int64, ``IGNORED`` where nothing is asked.
        """

    @property
    @abc.abstractmethod
    def chance(self) -> float:
        """The accuracy of guessing."""

    def loss(self, scores: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats of scores (batch, answers, vocabulary) over the answers that count."""
        return F.cross_entropy(scores.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED)

    def judge(self, scores: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """How many answers are right, and how many there are; both scalars on the device."""
        asked = targets != IGNORED
        return ((scores.argmax(-1) == targets) & asked).sum(), asked.sum()


def uniform(low: int, high: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Integers of ``low .. high - 1`` on the generator's device."""
    return torch.randint(low, high, shape, generator=generator, device=generator.device)


def distinct(count: int, choices: int, batch: int, generator: torch.Generator) -> Tensor:
    """(batch, count) different integers of ``0 .. choices - 1`` per row, in random order."""
    return torch.rand(batch, choices, generator=generator, device=generator.device).topk(count, dim=-1).indices
