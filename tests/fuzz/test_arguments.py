"""Command lines drawn at random: options, or a refusal in words with exit code 2; no command touches the folder."""

from __future__ import annotations

import dataclasses
import importlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longscan.cli import COMMANDS, main
from longscan.cli.train_options import ModelOptions
from longscan.tasks.text import TextConfig
from longscan.training.config import TrainConfig
from tests.fuzz.damage import names

FLAGS = [
    f"--{field.name.replace('_', '-')}"
    for kind in (TextConfig, ModelOptions, TrainConfig)
    for field in dataclasses.fields(kind)
] + ["--config", "--resume", "--device", "--name", "--runs", "--nproc", "--help", "--tasks", "--prompt", "--list", "--"]
VALUES = [
    "0",
    "1",
    "-1",
    "1e999",
    "nan",
    "None",
    "True",
    "cpu",
    "mamba",
    "adamw",
    "text",
    ".",
    "/",
    "nowhere",
    "",
    "--",
    "=",
]
WORDS = st.lists(
    st.sampled_from(FLAGS) | st.sampled_from(VALUES) | st.text(max_size=6)
    | st.builds("{}={}".format, st.sampled_from(FLAGS), st.sampled_from(VALUES)),
    max_size=6,
)  # fmt: skip


@settings(max_examples=120, deadline=None)
@given(command=st.sampled_from([*COMMANDS, "trian", ""]) | st.text(max_size=5), words=WORDS)
def test_command_lines(tmp_path_factory: pytest.TempPathFactory, command: str, words: list[str]) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        if command in COMMANDS:
            # What is tested is how options are read, not what the command does with them.
            patch.setattr(importlib.import_module(f"longscan.cli.{command}"), "run", lambda options: 0)
        try:
            code = main([command, *words])
        except SystemExit as stop:
            code = stop.code
    assert code in (0, 2)
    assert names(folder) == []


def test_the_options_are_read_at_all(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    monkeypatch.setattr(importlib.import_module("longscan.cli.train"), "run", lambda options: read.append(options) or 0)
    assert main(["train", "text", "--seed", "7", "--device", "cpu"]) == 0
    assert read[0].training.seed == 7
    with pytest.raises(SystemExit, match="2"):
        main(["train", "text", "--device", "cpu", "--seed", str(1 << 64)])
    assert "seed must fit in 64 bits" in capsys.readouterr().err
