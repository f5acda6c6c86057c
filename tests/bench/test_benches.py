"""Every benchmark in miniature: that it runs, that its figures are figures, and that installed peers agree with us."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from longscan.bench import Settings, floors
from longscan.cli import bench as command
from longscan.errors import ArgumentError

SHAPES = {
    "scan": (1, 9, 24, 4),
    "block": (1, 8, 32),
    "train": (1, 32, 50, 2, 8),
    "prefill": (2, 32, 50, 12),
    "decode": (2, 32, 50, 4),
}


@pytest.mark.parametrize("name", SHAPES)
def test_runs_and_everyone_agrees(name: str) -> None:
    settings = Settings(shapes=(SHAPES[name],), dtypes=("float32",), repeats=1, budget=0.2)
    report = importlib.import_module(f"longscan.bench.{name}").run(settings)
    assert report.failed == []
    for group in report.groups():
        assert [row.contender for row in report.of(group)][:2] == ["longscan", "reference"]
    for row in report.rows:
        assert row.value is not None, f"{row.contender}: {row.note}"
        assert row.value > 0
        assert row.kind == "floor" or row.error is not None


@pytest.mark.parametrize("name", ["prefill", "decode", "block"])
def test_half_precision(name: str) -> None:
    settings = Settings(shapes=(SHAPES[name],), dtypes=("bfloat16",), peers=(), repeats=1, budget=0.2)
    report = importlib.import_module(f"longscan.bench.{name}").run(settings)
    assert report.failed == []


def test_floors_count_what_they_say() -> None:
    assert floors.mamba_products(10, 64, d_state=16) == [(10, 64, 256), (10, 128, 36), (10, 4, 128), (10, 128, 64)]
    assert floors.read_bandwidth(size=2**20, repeats=1) > 0
    assert floors.multiply_adds_per_second(size=64, repeats=1) > 0
    assert floors.matrix_products([(4, 8, 16)], torch.bfloat16, repeats=1).median > 0


def test_command_writes_json_and_figure(tmp_path: Path) -> None:
    output = tmp_path / "scan.json"
    options = command.Options(
        "scan", shape=("1,9,24,4",), device="cpu", threads=1, alone=True, repeats=1, budget=0.1, output=output
    )
    console = Console(record=True, width=100)
    threads = torch.get_num_threads()
    assert command.run(options, console) == 0
    assert torch.get_num_threads() == threads
    assert "longscan" in console.export_text()
    assert output.with_suffix(".png").exists()
    values = json.loads(output.read_text())
    assert values["bench"] == "scan"
    assert values["machine"]["threads"] == 1
    assert {"group", "contender", "timing", "value", "error"} <= values["rows"][0].keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (command.Options("scan", shape=("1,x",)), "shape"),
        (command.Options("scan", device="tape"), "device"),
        (command.Options("scan", threads=0), "threads"),
        (command.Options("scan", shape=("1,2",), device="cpu"), "expected 4 positive integers"),
    ],
)
def test_bad_options_are_named(options: command.Options, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        command.run(options, Console(quiet=True))
