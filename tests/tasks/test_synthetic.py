"""Synthetic tasks: what is asked is what stands in the sequence."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from longscan.errors import ArgumentError
from longscan.tasks.associative_recall import AssociativeRecall, MultiQueryAssociativeRecall
from longscan.tasks.copying import Copying
from longscan.tasks.induction_heads import InductionHeads
from longscan.tasks.registry import TASKS
from longscan.tasks.selective_copying import SelectiveCopying
from longscan.tasks.task import IGNORED, Task

SMALL: tuple[Task, ...] = (
    SelectiveCopying(length=40, tokens=5),
    Copying(length=40, tokens=5),
    InductionHeads(length=32),
    AssociativeRecall(length=12, vocab=10),
    MultiQueryAssociativeRecall(length=48, pairs=4, vocab=64),
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("task", SMALL, ids=lambda task: task.name)
def test_shapes_ranges_and_seeds(task: Task) -> None:
    tokens, targets = task.sample(64, generator())
    assert targets.shape == (64, task.answers())
    assert tokens.shape[0] == 64
    assert tokens.shape[1] >= task.length
    assert tokens.dtype == targets.dtype == torch.int64
    assert 0 <= int(tokens.min()) <= int(tokens.max()) < task.vocabulary
    asked = targets[targets != IGNORED]
    assert 0 <= int(asked.min()) <= int(asked.max()) < task.vocabulary
    again = task.sample(64, generator())
    assert torch.equal(tokens, again[0])
    assert torch.equal(targets, again[1])
    assert not torch.equal(tokens, task.sample(64, generator(1))[0])
    longer, answers = task.sample(3, generator(), length=2 * task.length)
    assert longer.shape[1] == tokens.shape[1] + task.length
    assert answers.shape[1] == task.answers(2 * task.length)


@pytest.mark.parametrize("task", [SMALL[0], SMALL[1]], ids=lambda task: task.name)
def test_copying_asks_for_the_data_in_order(task: SelectiveCopying) -> None:
    tokens, targets = task.sample(200, generator())
    read, markers = tokens[:, : task.length], tokens[:, task.length :]
    assert (markers == task.vocab - 1).all()
    for row, wanted in zip(read, targets, strict=True):
        assert torch.equal(row[row != 0], wanted)
    used = (read != 0).any(0)
    if isinstance(task, Copying):
        assert used.nonzero().flatten().tolist() == list(range(task.tokens))
    else:
        assert used.all()
    assert set(targets.unique().tolist()) == set(range(1, task.vocab - 1))


def test_induction_asks_for_what_came_after_the_special_token() -> None:
    task = InductionHeads(length=16)
    tokens, targets = task.sample(500, generator())
    first = set()
    for row, wanted in zip(tokens.tolist(), targets.flatten().tolist(), strict=True):
        places = [place for place, token in enumerate(row) if token == task.vocab - 1]
        assert len(places) == 2
        assert places[1] == len(row) - 1
        assert row[places[0] + 1] == wanted != task.vocab - 1
        first.add(places[0])
    assert first == set(range(14))


def test_recall_asks_for_a_value_that_was_shown() -> None:
    task = AssociativeRecall(length=12, vocab=10)
    tokens, targets = task.sample(300, generator())
    for row, wanted in zip(tokens.tolist(), targets.flatten().tolist(), strict=True):
        pairs = list(zip(row[0:12:2], row[1:12:2], strict=True))
        shown = dict(pairs)
        assert all(shown[key] == value for key, value in pairs), "one value per key"
        assert all(key < 4 <= value < 8 for key, value in pairs)
        assert row[12] == 8
        assert shown[row[13]] == wanted


def test_many_queries_ask_for_every_key_once() -> None:
    task = MultiQueryAssociativeRecall(length=48, pairs=4, vocab=64)
    tokens, targets = task.sample(400, generator())
    gaps = torch.zeros(20)
    for row, wanted in zip(tokens.tolist(), targets.tolist(), strict=True):
        shown = dict(zip(row[0:8:2], row[1:8:2], strict=True))
        assert len(shown) == len(set(shown.values())) == 4
        asked = {row[8 + place]: value for place, value in enumerate(wanted) if value != IGNORED}
        assert asked == shown
        for place, value in enumerate(wanted):
            if value != IGNORED:
                assert place % 2 == 0
                gaps[place // 2] += 1
    assert gaps[0] > 2 * gaps[5] > 0, "near places are likelier"


def test_judging_counts_only_what_is_asked() -> None:
    task = InductionHeads()
    targets = torch.tensor([[1, IGNORED], [2, 3]])
    scores = torch.nn.functional.one_hot(torch.tensor([[1, 1], [2, 2]]), 16).float()
    right, asked = task.judge(scores, targets)
    assert (int(right), int(asked)) == (2, 3)
    expected = -scores.log_softmax(-1)[[0, 1, 1], [0, 0, 1], [1, 2, 3]].mean()
    assert task.loss(scores, targets).item() == pytest.approx(expected.item())


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("selective_copying", {"length": 8}, "at least tokens, 16; got 8"),
        ("copying", {"vocab": 2}, "vocab must be at least 3"),
        ("induction_heads", {"length": 2}, "length must be at least 3"),
        ("associative_recall", {"length": 7}, "must be even"),
        ("mqar", {"length": 8}, "at least 4 pairs, 16; got 8"),
        ("mqar", {"vocab": 8}, "at least 2 pairs"),
        ("induction_heads", {"length": 0}, "integer of at least 1, got 0"),
    ],
)
def test_impossible_settings_are_refused(name: str, changes: dict[str, int], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        dataclasses.replace(TASKS[name](), **changes)
