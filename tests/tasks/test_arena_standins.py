"""Made-up reviews, pairs and shapes: the classes are what one finds by reading and looking."""

from __future__ import annotations

from collections import Counter

import numpy as np
import torch

from longscan.tasks.arena_standins import _KIND, _UNKIND, RetrievalStandin, ReviewsStandin, ShapesStandin

CPU = torch.device("cpu")
PARTS = {"train": 60, "valid": 1, "test": 20}


def texts(stored: torch.Tensor) -> list[str]:
    return [row.numpy().tobytes().rstrip(b"\0").decode() for row in stored]


def test_reviews_are_what_most_of_their_opinions_are() -> None:
    split = ReviewsStandin(length=300, **PARTS).on(CPU)
    for text, label in zip(texts(split.train_inputs), split.train_targets.tolist(), strict=True):
        assert text.endswith(". ")
        balance, negated = 0, False
        for word in text.replace(".", "").split():
            if word in _KIND or word in _UNKIND:
                balance += 1 if (word in _KIND) != negated else -1
            negated = word == "not"
        assert balance
        assert label == (balance > 0)
    assert 0.3 < float(split.train_targets.double().mean()) < 0.7


def test_pairs_share_the_words_that_come_again() -> None:
    task = RetrievalStandin(length=300, **PARTS)
    split = task.on(CPU)
    assert split.train_inputs.shape == (60, 600)
    for row, label in zip(split.train_inputs, split.train_targets.tolist(), strict=True):
        often = [{word for word, _ in Counter(text.split()).most_common(4)} for text in texts(row.reshape(2, -1))]
        assert (len(often[0] & often[1]) >= 1) == label
    assert 0.3 < float(split.train_targets.double().mean()) < 0.7
    tokens, _ = task.sample(3, torch.Generator().manual_seed(0))
    assert task.words(tokens[0]).splitlines() == texts(tokens[0].to(torch.uint8).reshape(2, -1))
    lengths = task.lengths(tokens)
    assert lengths is not None
    assert lengths.shape == (3, 2)


def test_shapes_fill_as_much_of_their_box_as_they_should() -> None:
    split = ShapesStandin(train=400, valid=1, test=1).on(CPU)
    corner = 0.55 / 0.9
    share = [
        np.pi / 4,
        np.pi / 4 * (1 - 0.65**2),
        1,
        1 - corner**2,
        0.5,
        1 - (1 - 0.25 / 0.9) ** 2,
        None,
        0.5,
        None,
        None,
    ]
    filled: dict[int, list[float]] = {}
    for row, label in zip(split.train_inputs, split.train_targets.tolist(), strict=True):
        image = row.reshape(32, 32).numpy().astype(float)
        image = np.abs(image - np.median(image[[0, -1]]))  # what the edges are is the ground
        # Noise is far from half the contrast once it is averaged with neighbours.
        padded = np.pad(image, 1, mode="edge")
        smooth = sum(padded[y : y + 32, x : x + 32] for y in range(3) for x in range(3)) / 9
        rows, columns = np.where(smooth > 0.5 * np.quantile(smooth, 0.99))
        box = (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
        filled.setdefault(label, []).append(len(rows) / box)
    assert sorted(filled) == list(range(10))
    for label, expected in enumerate(share):
        if expected is not None:
            assert abs(float(np.median(filled[label])) - expected) < 0.1
