"""Dashed paths: labels by tracing, from the dashes' places alone and from the pixels alone."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from longscan.errors import ArgumentError, DataError
from longscan.tasks.generators.pathfinder import Drawn, Paths, arena_paths, draw_paths

SIZES = (32, 64, 128)


def components(joined: np.ndarray) -> np.ndarray:
    """The smallest member of each member's component, of a symmetric relation."""
    reach = joined | np.eye(len(joined), dtype=bool)
    while True:
        further = (reach.astype(np.float32) @ reach.astype(np.float32)) > 0
        if (further == reach).all():
            return reach.argmax(1)
        reach = further


def chains(lines: np.ndarray, margins: tuple[float, ...]) -> np.ndarray:
    """The path of each dash: a dash follows another if the joint behind that one is the joint before it."""
    along = lines[:, 2:] - lines[:, :2]
    along /= np.linalg.norm(along, axis=1, keepdims=True)
    follows = np.zeros((len(lines), len(lines)), bool)
    for margin in margins:
        behind, before = lines[:, 2:] + margin * along, lines[:, :2] - margin * along
        follows |= np.linalg.norm(behind[:, None] - before[None], axis=-1) < 1e-6
    assert follows.sum(0).max() <= 1
    assert follows.sum(1).max() <= 1
    return components(follows | follows.T)


def distances(lines: np.ndarray) -> np.ndarray:
    """Between all pairs of dashes, from many points of each."""
    share = np.linspace(0, 1, 9)[:, None]
    points = lines[:, None, :2] + share * (lines[:, None, 2:] - lines[:, None, :2])
    return np.linalg.norm(points[:, None, :, None] - points[None, :, None], axis=-1).min((2, 3))


def each(drawn: Drawn) -> list[tuple[np.ndarray, np.ndarray, np.ndarray, int]]:
    return [
        (image, lines[:count], dots.reshape(2, 2), int(label))
        for image, lines, count, dots, label in zip(
            drawn.images, drawn.lines, drawn.counts, drawn.dots, drawn.labels, strict=True
        )
    ]


@pytest.mark.parametrize("size", SIZES)
def test_labels_are_those_of_the_traced_dashes(size: int) -> None:
    paths = arena_paths(size)
    drawn = draw_paths(40, paths, seed=1)
    assert drawn.labels.sum() == 20
    for _, lines, dots, label in each(drawn):
        path = chains(lines, paths.margins)
        lengths = sorted(np.bincount(path)[np.unique(path)])
        assert lengths[-2:] == [14, 14]
        assert set(lengths[:-2]) <= {4}
        assert len(lengths) <= 2 + paths.distractors
        starts = np.linalg.norm(lines[:, :2] - dots[0], axis=1)
        ends = np.linalg.norm(lines[:, 2:] - dots[1], axis=1)
        assert starts.min() < 1e-9
        assert ends.min() < 1e-9
        first, last = path[starts.argmin()], path[ends.argmin()]
        assert (path == first).sum() == (path == last).sum() == 14
        assert label == (first == last)


@pytest.mark.parametrize("size", SIZES)
def test_dashes_keep_apart_and_off_the_edges(size: int) -> None:
    paths = arena_paths(size)
    for _, lines, _, _ in each(draw_paths(30, paths, seed=2)):
        assert np.allclose(np.linalg.norm(lines[:, 2:] - lines[:, :2], axis=1), paths.dash)
        edge = paths.padding + min(paths.margins) + paths.thickness / 2
        assert edge - 1e-9 <= lines.min() <= lines.max() <= size - edge + 1e-9
        near = distances(lines) < 2 * min(paths.margins) + paths.thickness - 1e-9
        np.fill_diagonal(near, False)
        path = chains(lines, paths.margins)
        neighbours = near.sum(1)
        assert neighbours.max() <= 2  # the one before and the one behind
        assert (path[:, None] == path[None])[near].all()


def test_dashes_turn_no_more_than_they_may() -> None:
    paths = arena_paths(128)
    turns = []
    for _, lines, _, _ in each(draw_paths(30, paths, seed=3)):
        along = lines[:, 2:] - lines[:, :2]
        heading = np.arctan2(along[:, 1], along[:, 0])[:28]
        turns.append((heading[2:] - heading[:-2] + np.pi) % (2 * np.pi) - np.pi)
    turn = np.concatenate(turns)
    assert np.abs(turn).max() <= np.pi / 2 / 1.8
    assert abs(turn.mean()) < 0.05
    # cos^2(1.8 x) has a deviation of 0.316 rad; rooms that were full turn some away.
    assert 0.25 < turn.std() < 0.4


def grow(lit: np.ndarray, radius: float) -> np.ndarray:
    """Pixels nearer to a lit one than a radius."""
    reach = int(radius)
    padded = np.pad(lit, reach)
    out = np.zeros_like(lit)
    for dy in range(-reach, reach + 1):
        for dx in range(-reach, reach + 1):
            if dx * dx + dy * dy <= radius * radius:
                out |= padded[reach + dy : reach + dy + len(lit), reach + dx : reach + dx + len(lit)]
    return out


def flood(lit: np.ndarray, start: tuple[int, int]) -> np.ndarray:
    """Lit pixels that are connected with one."""
    reached = np.zeros_like(lit)
    reached[start] = True
    while True:
        further = grow(reached, 1.5) & lit
        if (further == reached).all():
            return reached
        reached = further


def test_labels_are_those_of_the_pixels() -> None:
    """With rounded dashes as thick as here, the gaps in a path are narrower than those between paths."""
    paths = dataclasses.replace(arena_paths(128), thickness=3.0, margins=(3.0,), marker=2.0, contrast=0.6)
    drawn = draw_paths(16, paths, seed=4)
    for image, _, dots, label in each(drawn):
        assert image.max() == 255
        ends = [tuple(np.floor(dot[::-1]).astype(int)) for dot in dots]
        assert all(image[end] == 255 for end in ends)
        # Gaps are 6 - 3 wide in a path and 6 between paths, where both grow by 2.
        joined = flood(grow(image > 76, 2.0), ends[0])
        assert bool(joined[ends[1]]) == bool(label)


def test_drawing() -> None:
    paths = arena_paths(32)
    for image, lines, dots, _ in each(draw_paths(20, paths, seed=5)):
        y, x = np.mgrid[:32, :32] + 0.5
        to_dots = np.sqrt((x[..., None] - dots[:, 0]) ** 2 + (y[..., None] - dots[:, 1]) ** 2).min(-1)
        assert (image[to_dots < 1.0] == 255).all()
        away = to_dots > 2.1
        assert image[away].max() <= round(0.75 * 255)
        share = np.linspace(0, 1, 9)[:, None]
        points = (lines[:, None, :2] + share * (lines[:, None, 2:] - lines[:, None, :2])).reshape(-1, 2)
        to_lines = np.sqrt((x[..., None] - points[:, 0]) ** 2 + (y[..., None] - points[:, 1]) ** 2).min(-1)
        assert (image[away & (to_lines > 0.8)] == 0).all()
        middles = np.floor((lines[:, :2] + lines[:, 2:]) / 2).astype(int)
        assert (image[middles[:, 1], middles[:, 0]] >= 10).all()


def test_the_seed_and_the_number_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    paths = arena_paths(32, dashes=6)
    whole = draw_paths(12, paths, seed=6)
    assert len(np.unique(whole.images, axis=0)) == 12
    part = draw_paths(5, paths, seed=6, first=7)
    assert np.array_equal(part.images, whole.images[7:])
    assert np.array_equal(part.labels, whole.labels[7:])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert np.array_equal(draw_paths(12, paths, seed=6).images, whole.images)
    assert not np.array_equal(draw_paths(12, paths, seed=7).images, whole.images)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 20}, "size must be at least 4 seed_distance, 28"),
        ({"dashes": 0}, "need a dash"),
        ({"dash": 6.0}, "dash must be shorter"),
        ({"continuity": 0.5}, "continuity must be at least 1"),
    ],
)
def test_paths_that_cannot_be(change: dict[str, float], message: str) -> None:
    fields = dataclasses.asdict(arena_paths(32)) | change
    with pytest.raises(ArgumentError, match=message):
        Paths(**fields)


def test_no_room() -> None:
    with pytest.raises(DataError, match="no room"):
        draw_paths(1, dataclasses.replace(arena_paths(32), dashes=60), seed=0)
    with pytest.raises(ArgumentError, match="one of 32, 64, 128"):
        arena_paths(48)
