"""What a task is: sequences drawn on the device, what is asked of them, how it is judged, and a recipe."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from longscan.errors import ArgumentError

#: Targets with this value do not count, as in PyTorch's cross-entropy.
IGNORED = -100


@dataclasses.dataclass(frozen=True)
class Metric:
    """What a task is judged by.

    Args:
        name: such as "accuracy".
        unit: that figures are shown in.
        higher_is_better: whether.
        factor: from a figure to what is shown (100 for percent); published figures are as shown.
        digits: shown behind the point.
        root: whether the figure is the root of the mean.
        exponential: whether it is the exponential of the mean.
    """

    name: str
    unit: str = ""
    higher_is_better: bool = True
    factor: float = 1.0
    digits: int = 3
    root: bool = False
    exponential: bool = False

    def score(self, sum: float, count: float) -> float:
        """The figure, from the two sums that :meth:`Task.judge` gives."""
        mean = sum / count
        if self.exponential:
            return math.exp(mean)
        return math.sqrt(mean) if self.root else mean

    def reaches(self, figure: float, bound: float) -> bool:
        """Whether a figure is as good as another."""
        return figure >= bound if self.higher_is_better else figure <= bound

    def number(self, figure: float) -> str:
        """A figure as shown, without its unit; the best share of all only if it is that."""
        text = f"{self.factor * figure:.{self.digits}f}"
        all_of_it = f"{100:.{self.digits}f}"
        if self.higher_is_better and self.unit == "%" and text == all_of_it and figure < 1:
            return f"{100 - 10**-self.digits:.{self.digits}f}+"
        return text

    def text(self, figure: float) -> str:
        """A figure with its unit."""
        return self.number(figure) + (self.unit if self.unit == "%" else f" {self.unit}".rstrip())


#: The share of right answers.
ACCURACY = Metric("accuracy", "%", factor=100, digits=1)
#: Root mean square error over the root mean square of what was asked for.
NRMSE = Metric("NRMSE", "%", higher_is_better=False, factor=100, digits=2, root=True)
#: Of predictions, over the bytes that they are of.
BITS_PER_BYTE = Metric("bits per byte", higher_is_better=False)
#: The exponential of the mean nats of a token.
PERPLEXITY = Metric("perplexity", higher_is_better=False, exponential=True)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A small model and how it is trained.

    Args:
        d_model, n_layer, d_intermediate, mixer_options, block, block_options: of the model, see
            :class:`longscan.LanguageModelConfig` and :class:`longscan.models.ClassifierConfig`.
        parameters: of a language model, about: the width gives way, and with it ``d_intermediate`` in proportion; 0: as
            wide as ``d_model`` says.
        model: "auto", what the task needs; or "sashimi" for a task over tokens that is asked at its last places.
        model_options: further arguments of the model's configuration, such as ``{"pooling": "last"}``.
        objective: what training lowers: "loss", the task's, or "log-loss", its logarithm (cross-entropy only): every
            step then counts by how much it changes the loss in proportion, however small that is; see
            :func:`longscan.training.objectives.log_cross_entropy`.
        lengths: to train at before the task's own, one after the other, each until the figure over a stretch of steps
            is as good as ``passed``.
        passed: see ``lengths`` and ``carry_state``.
        patience: steps after which the next of ``lengths`` comes although this one is not learnt: a model that never
            learns it is trained at the task's own length nevertheless; 0: it waits.
        carry_state: whether a batch goes on from the states that the last one ended with, see
            :mod:`longscan.training.carried`, once the figure is as good as ``passed`` without; of language models whose
            memory does not grow.
        steps, batch_size: of training.
        learning_rate: the highest, after ``warmup`` steps of linear rise.
        schedule: "constant"; or "cosine" or "linear", down to ``floor`` of it at the last step.
        dynamics_rate: highest learning rate of what mixers keep in float32 whatever their weights are (A, B, dt, D of
            state spaces); 0: as for the rest.
        weight_decay: of AdamW, on matrices.
        betas, eps: of AdamW.
        shortest: length that training begins with (HyenaDNA's warm-up of lengths, Nguyen et al. 2023); it doubles, up
            to the task's, over the first ``length_warmup`` steps. Batches have as many more sequences, and so as many
            places as ``batch_size`` of the task's length; 0: all training is at the task's length.
        length_warmup: see there.
        clip: largest norm of the gradient; 0 leaves it as it is.
        precision: "float32", or "bfloat16" (autocast).
    """

    d_model: int = 64
    n_layer: int = 2
    d_intermediate: int = 0
    mixer_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    block: str = "plain"
    block_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    parameters: int = 0
    model: Literal["auto", "sashimi"] = "auto"
    model_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    objective: Literal["loss", "log-loss"] = "loss"
    lengths: tuple[int, ...] = ()
    passed: float = 0.99
    patience: int = 0
    carry_state: bool = False
    steps: int = 1000
    batch_size: int = 32
    learning_rate: float = 1e-3
    dynamics_rate: float = 0.0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    warmup: int = 0
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    floor: float = 0.0
    shortest: int = 0
    length_warmup: int = 0
    clip: float = 1.0
    precision: Literal["float32", "bfloat16"] = "float32"


@dataclasses.dataclass(frozen=True)
class Task(abc.ABC):
    """A task over sequences.

    A model reads ``inputs`` and gives scores: at the last ``answers(length)`` places, one row for the whole sequence,
    or a row at every place, as :attr:`readout` says.

    Args:
        length: what the task calls its length; see :meth:`sample`.
    """

    length: int

    name: ClassVar[str]
    #: The recipe at the scale of the paper that the task is from.
    recipe: ClassVar[Recipe]
    #: Tokens (batch, places) int64, or values (batch, places, channels) float32.
    inputs: ClassVar[Literal["tokens", "values"]] = "tokens"
    #: Where scores are asked: at the last places, of the pooled sequence, or at every place.
    readout: ClassVar[Literal["last", "pooled", "every"]] = "last"
    metric: ClassVar[Metric] = ACCURACY
    #: What the keys of figures are: lengths, or what :meth:`tests` takes for one.
    axis: ClassVar[str] = "length"

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type in (int, "int") and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ArgumentError(f"{self.name}: {field.name} must be an integer of at least 1, got {value!r}")

    @property
    def vocabulary(self) -> int:
        """Number of tokens; tokens are ``0 .. vocabulary - 1``."""
        raise NotImplementedError(f"{self.name} has no tokens")

    @property
    def channels(self) -> int:
        """Number of values at a place."""
        raise NotImplementedError(f"{self.name} has no values")

    @property
    def outputs(self) -> int:
        """Width of the scores: classes, or numbers asked for."""
        return self.vocabulary

    @property
    def image_shape(self) -> tuple[int, ...] | None:
        """(height, width), if a sequence of this length is an image's rows."""
        return None

    @property
    def held_out(self) -> int | None:
        """How many sequences :meth:`tests` gives, if there is an end to them."""
        return None

    def answers(self, length: int | None = None) -> int:
        """With readout "last": at how many of the last places answers may be asked."""
        raise NotImplementedError(f"{self.name} does not ask at its last places")

    @property
    @abc.abstractmethod
    def chance(self) -> float:
        """The figure of guessing."""

    @abc.abstractmethod
    def sample(self, batch: int, generator: torch.Generator, length: int | None = None) -> tuple[Tensor, Tensor]:
        """Draw sequences to train on.

        All on the generator's device, without waiting for it: the call can be captured in a CUDA graph that knows the
        generator.

        Args:
            batch: number of sequences.
            generator: source of all that is random.
            length: instead of the task's own.

        Returns:
            inputs, and targets: int64 classes (batch, answers) or, pooled, (batch,), ``IGNORED`` where nothing is
            asked; for a regression, float32 values like the scores, NaN where nothing is.
        """

    def to(self, device: torch.device) -> None:  # noqa: B027 (most tasks have nothing to do)
        """Bring what is drawn from to a device, before the first draw there."""

    def tests(
        self, length: int, sequences: int, batch: int, device: torch.device, seed: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches to test on: as :meth:`sample` gives them, from draws that no training saw.

        Args:
            length: of the sequences, or another key of the task's figures.
            sequences: at least so many, if there is no end to them; a finite set gives all of its held-out part.
            batch: sequences at once.
            device: of the tensors.
            seed: of the draws.
        """
        generator = torch.Generator(device).manual_seed(seed + (1 << 32))
        for _ in range(-(-sequences // batch)):
            yield self.sample(batch, generator, length)

    def best(self, length: int, sequences: int, seed: int) -> float | None:
        """The figure that no model beats on what :meth:`tests` gives, but by luck; None: not known."""
        return None

    def lengths(self, inputs: Tensor) -> Tensor | None:
        """(batch,) places of each that count, from the first; None: all. For readouts that are not "last"."""
        return None

    def words(self, tokens: Tensor) -> str | None:
        """What a person reads, for a sequence (places,) of tokens; None: tokens have no names."""
        return None

    def loss(self, scores: Tensor, targets: Tensor) -> Tensor:
        """What training lowers: the mean, over all that is asked, of the cross-entropy in nats of scores (...,
        outputs), or of the squared error where targets are values."""
        if targets.is_floating_point():
            errors, _, asked = _errors(scores, targets)
            return errors.sum() / asked.sum()
        return F.cross_entropy(scores.float().flatten(0, -2), targets.flatten(), ignore_index=IGNORED)

    def judge(self, scores: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Two sums whose quotient the metric is of, scalars on the device: right answers and answers; or, where targets
        are values, squared errors and squared targets."""
        if targets.is_floating_point():
            errors, squares, _ = _errors(scores, targets)
            return errors.sum(), squares.sum()
        asked = targets != IGNORED
        return ((scores.argmax(-1) == targets) & asked).sum(), asked.sum()


def _errors(scores: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Squared errors and squared targets, 0 where a target is NaN, and where it is not."""
    asked = ~targets.isnan()
    # NaN times 0 is no 0: it must not reach the gradient.
    targets = targets.where(asked, 0)
    return (scores.float().where(asked, 0) - targets).square(), targets.square(), asked


def uniform(low: int, high: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Integers of ``low .. high - 1`` on the generator's device."""
    return torch.randint(low, high, shape, generator=generator, device=generator.device)


def distinct(count: int, choices: int, batch: int, generator: torch.Generator) -> Tensor:
    """(batch, count) different integers of ``0 .. choices - 1`` per row, in random order."""
    return torch.rand(batch, choices, generator=generator, device=generator.device).topk(count, dim=-1).indices
