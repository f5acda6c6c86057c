"""Stand-ins for the sets of the Long Range Arena that must be downloaded: reviews, pairs of texts, and shapes."""

from __future__ import annotations

import dataclasses
import itertools
from typing import ClassVar

import numpy as np

from longscan.tasks.byte_text import Bytes
from longscan.tasks.generated import GeneratedTask
from longscan.tasks.labelled_text import Row, pack
from longscan.tasks.pixels import PixelTask
from longscan.tasks.task import Recipe

_OPINIONS = 24
_OPINION_SHARE, _NEGATED_SHARE = 0.5, 0.3
_TOPIC_WORDS, _TOPIC_SHARE = 6, 0.4


def _made_up_words() -> list[str]:
    """1,600 words of two syllables, in an order that is always the same."""
    syllables = ["".join(pair) for pair in itertools.product("bdfklmrt", "aeiou")]
    words = ["".join(pair) for pair in itertools.product(syllables, syllables)]
    return [words[k] for k in np.random.default_rng(0).permutation(len(words))]


_WORDS = _made_up_words()
_KIND, _UNKIND, _FILLERS = _WORDS[:_OPINIONS], _WORDS[_OPINIONS : 2 * _OPINIONS], _WORDS[2 * _OPINIONS :]


def _sentence(random: np.random.Generator) -> list[str]:
    return [_FILLERS[k] for k in random.integers(len(_FILLERS), size=random.integers(3, 9))]


def _review(random: np.random.Generator, length: int) -> Row:
    """Sentences that fit into a length. Some say something kind or unkind, or the opposite after "not"; the class is
    what the most of them say."""
    while True:
        text, balance = "", 0
        while True:
            sentence = _sentence(random)
            says = 0
            if random.random() < _OPINION_SHARE:
                kind, negated = random.random() < 0.5, random.random() < _NEGATED_SHARE
                word = str(random.choice(_KIND if kind else _UNKIND))
                sentence.insert(int(random.integers(len(sentence))), f"not {word}" if negated else word)
                says = 1 if kind != negated else -1
            sentence_text = " ".join(sentence) + ". "
            if len(text) + len(sentence_text) > length:
                break
            text, balance = text + sentence_text, balance + says
        if balance:
            return (text.encode(),), int(balance > 0)


def _pair(random: np.random.Generator, length: int) -> Row:
    """Two texts, each about a few words that come again and again; in the first class about the same ones."""
    label = int(random.integers(2))
    topics = random.permutation(len(_FILLERS))[: 2 * _TOPIC_WORDS].reshape(2, -1)
    texts = []
    for topic in (topics[0], topics[1 - label]):
        words = random.integers(len(_FILLERS), size=length // 5)
        words = np.where(random.random(len(words)) < _TOPIC_SHARE, random.choice(topic, len(words)), words)
        texts.append(" ".join(_FILLERS[word] for word in words).encode())
    return tuple(texts), label


def _shapes(count: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """One of ten shapes each, of any size at any place, bright on a dark ground or dark on a bright one, with noise."""
    random = np.random.default_rng(0)
    classes = random.integers(10, size=count)
    radius = random.uniform(side / 6, side / 3, (count, 1, 1))
    middle = radius + random.random((2, count, 1, 1)) * (side - 2 * radius)
    grid = np.arange(side) + 0.5
    x, y = (grid - middle[0]) / radius, (grid[:, None] - middle[1]) / radius
    across, out = np.maximum(abs(x), abs(y)), np.hypot(x, y)
    square = across < 0.9
    drawn = np.stack([
        out < 1,
        (out < 1) & (out > 0.65),
        square,
        square & (across > 0.55),
        abs(x) + abs(y) < 1,
        square & (np.minimum(abs(x), abs(y)) < 0.25),
        square & (np.minimum(abs(x + y), abs(x - y)) < 0.35),
        (abs(y) < 0.9) & (abs(x) < (y + 0.9) / 1.8),
        square & (np.floor(y * 3) % 2 == 0),
        square & (np.floor(x * 3) % 2 == 0),
    ])  # fmt: skip
    shape = drawn[classes, np.arange(count)]
    ground, paint = random.uniform(0.1, 0.4, (count, 1, 1)), random.uniform(0.6, 0.9, (count, 1, 1))
    inverted = random.random((count, 1, 1)) < 0.5
    image = np.where(shape != inverted, paint, ground) + random.normal(0, 0.08, (count, side, side))
    return np.rint(255 * image.clip(0, 1)).astype(np.uint8).reshape(count, -1), classes


@dataclasses.dataclass(frozen=True)
class ReviewsStandin(GeneratedTask, Bytes):
    """Is a made-up review kinder than unkind? For the reviews of IMDb.

    Args:
        length: longest review.
        train, valid, test, tested_on: see :class:`GeneratedTask`.
    """

    length: int = 1000
    train: int = 8_000
    valid: int = 1_000
    test: int = 1_000

    name: ClassVar[str] = "reviews_standin"
    recipe: ClassVar[Recipe] = Recipe(d_model=64, n_layer=2)

    def make(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        return pack((_review(np.random.default_rng(number), self.length) for number in range(count)), 1, self.length)


@dataclasses.dataclass(frozen=True)
class RetrievalStandin(GeneratedTask, Bytes):
    """Are two made-up texts about the same? For the pairs of the ACL Anthology Network; arguments as of reviews."""

    length: int = 500
    train: int = 8_000
    valid: int = 1_000
    test: int = 1_000

    name: ClassVar[str] = "retrieval_standin"
    recipe: ClassVar[Recipe] = Recipe(d_model=64, n_layer=2, model_options={"pair": True})
    texts: ClassVar[int] = 2

    def make(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        return pack((_pair(np.random.default_rng(number), self.length) for number in range(count)), 2, self.length)


@dataclasses.dataclass(frozen=True)
class ShapesStandin(GeneratedTask, PixelTask):
    """Which of ten shapes is drawn? For CIFAR-10 without colours.

    Args:
        length: pixels of an image.
        train, valid, test, tested_on: see :class:`GeneratedTask`.
    """

    length: int = 1024
    train: int = 20_000

    name: ClassVar[str] = "shapes_standin"
    recipe: ClassVar[Recipe] = Recipe(d_model=64, n_layer=2)

    @property
    def outputs(self) -> int:
        return 10

    def make(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        return _shapes(count, self.side)
