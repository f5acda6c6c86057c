"""Samples of every task: images, text short enough to be read, lines, strips."""

from __future__ import annotations

from pathlib import Path

import pytest

from longscan.plots.samples import _LINE, _LINES, _wrapped, plot_samples
from longscan.tasks.registry import TASKS
from longscan.tasks.task import Task

PARTS = {"train": 5, "valid": 1, "test": 1}
# They read files of the user's; their stand-ins are drawn alike.
OF_FILES = {
    *("audio", "dna", "dna_species", "sequential_digits", "permuted_digits", "character_trajectories"),
    *("byte_text", "retrieval", "grey_images", "language"),
}
SMALLER = {
    "listops": PARTS,
    "pathfinder": PARTS,
    "path_x": PARTS | {"length": 1024},
    "reviews_standin": PARTS,
    "retrieval_standin": PARTS,
    "shapes_standin": PARTS,
    "dna_standin": {"sequences": 10},
    "dna_species_standin": {"sequences": 10},
    "spoken_digits_standin": {"takes": 1, "rate": 2000, "length": 1000},
    "spoken_digits_classes_standin": {"takes": 1, "rate": 2000, "length": 1000},
}


@pytest.mark.parametrize("name", [name for name in TASKS if name not in OF_FILES])
def test_samples_of_every_task(name: str, tmp_path: Path) -> None:
    if name.startswith("spoken"):
        pytest.importorskip("espeakng_loader")
    if "digits" in name:
        pytest.importorskip("sklearn")
    task: Task = TASKS[name](**SMALLER.get(name, {}))  # type: ignore[arg-type]
    path = plot_samples(task, tmp_path / "a.png", count=3)
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_tasks_of_files_are_known() -> None:
    assert TASKS.keys() >= OF_FILES
    assert SMALLER.keys() <= TASKS.keys()


def test_lines_are_few_and_short() -> None:
    lines = _wrapped("word " * 1000)
    assert len(lines) == _LINES
    assert lines[-1] == "..."
    assert max(map(len, lines)) <= _LINE
    assert _wrapped("a costs $5\n\nb") == [r"a costs \$5", "", "b"]
