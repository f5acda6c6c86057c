"""The folder of a run: its name, what takes it away from another, and what is no run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from longscan.errors import ConfigError, StorageError
from longscan.training.runs import create_run, hold, read_run

CONFIG = {"text": {}, "model": {}, "training": {}}


def test_a_taken_name_gets_a_number(tmp_path: Path) -> None:
    names = [create_run(tmp_path / "runs", "text", CONFIG).name for _ in range(3)]
    assert names == ["text", "text-2", "text-3"]
    assert sorted(os.listdir(tmp_path / "runs")) == names
    assert read_run(tmp_path / "runs" / "text-3")["training"] == {}
    with pytest.raises(ConfigError, match=r"name: .*text exists; go on with it by --resume"):
        create_run(tmp_path / "runs", "text", CONFIG, exact=True)


def test_a_name_that_another_process_takes_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create_run(tmp_path, "text", CONFIG)
    monkeypatch.setattr(Path, "exists", lambda path: False)  # as it was when this process looked
    assert create_run(tmp_path, "text", CONFIG).name == "text-2"


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden"])
def test_names_that_are_no_folder_s(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="name must be a plain folder name"):
        create_run(tmp_path, name, CONFIG)


def test_a_place_where_nothing_can_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot make a run in"):
        create_run(tmp_path / "file", "text", CONFIG)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "is not a run of `longscan train`: config.json"),
        ("{", "is not a run"),
        ('{"model": {}}', "it lacks what `longscan train` writes"),
        ('{"format": 1, "text": {}, "model": {"n_layr": 2}, "training": {}}', "config.json: .*did you mean 'n_layer'"),
        ('{"format": 99, "text": {}, "model": {}, "training": {}}', "has format 99, this version reads 1"),
    ],
)
def test_what_is_no_run(tmp_path: Path, text: str | None, says: str) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=says):
        read_run(tmp_path)
    with pytest.raises(ConfigError, match="no such folder"):
        read_run(tmp_path / "nowhere")


def test_one_process_trains_a_run(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    with hold(tmp_path), pytest.raises(ConfigError, match="is being trained by another process"), hold(tmp_path):
        pass
    with hold(tmp_path):
        pass
