"""Every benchmark in miniature: that it runs, that its figures are figures, and that installed peers agree with us."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch
import tyro
from rich.console import Console

from longscan.bench import Settings, floors
from longscan.cli import bench as command
from longscan.errors import ArgumentError

SHAPES = {
    "scan": (1, 9, 24, 4),
    "block": (1, 8, 32),
    "train": (1, 32, 50, 2, 8),
    "prefill": (2, 32, 50, 12),
    "decode": (2, 32, 50, 1, 4),
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
        assert row.kind in ("floor", "other") or row.error is not None
        assert row.memory is None  # there is no allocator to ask on the CPU
    others = {"scan": ["attention", "convolution"], "train": ["transformer++"]}.get(name, [])
    assert [row.contender for row in report.rows if row.kind == "other"] == others * len(report.groups())
    ours = report.ours(report.groups()[0])
    assert ours is not None
    assert ours.of_floor is not None
    assert ours.of_floor > 0
    assert (ours.bandwidth is None) == (name == "train")


@pytest.mark.parametrize("name", ["prefill", "decode", "block"])
def test_half_precision(name: str) -> None:
    settings = Settings(shapes=(SHAPES[name],), dtypes=("bfloat16",), peers=(), repeats=1, budget=0.2)
    report = importlib.import_module(f"longscan.bench.{name}").run(settings)
    assert report.failed == []


def test_several_sequences_decode_together() -> None:
    settings = Settings(shapes=((1, 32, 50, 3, 4),), dtypes=("float32",), repeats=1, budget=0.2)
    report = importlib.import_module("longscan.bench.decode").run(settings)
    values = {row.contender: row.value for row in report.rows}
    assert "llama.cpp" not in values
    assert all(values.values())
    ours = report.rows[0]
    assert ours.timing is not None
    assert ours.value == pytest.approx(12 / ours.timing.median)


def test_a_transformer_decodes_behind_its_context() -> None:
    settings = Settings(
        shapes=((2, 32, 50, 3, 4),), dtypes=("float32",), peers=("transformer++",), repeats=2, budget=0.2
    )
    report = importlib.import_module("longscan.bench.decode").run(settings)
    row = next(row for row in report.rows if row.contender == "transformer++")
    assert row.kind == "other"
    assert "2048 tokens of context" in row.note
    assert row.timing is not None
    assert row.value == pytest.approx(12 / row.timing.median)
    # Keys and values of one layer over the context, for every token.
    assert row.bandwidth is not None
    assert row.bandwidth * row.timing.median > 4 * 3 * 2 * 32 * 2048 * 4


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
    assert {"group", "contender", "timing", "value", "error", "memory"} <= values["rows"][0].keys()
    assert values["rows"][0]["bandwidth"] > 0


def test_command_reads_peers_and_sizes() -> None:
    arguments = ["train", "--peers", "mamba-ssm", "transformer++", "--size", "130m", "1.4b", "--budget", "2"]
    options = tyro.cli(command.Options, args=arguments)
    assert options.peers == ("mamba-ssm", "transformer++")
    assert options.size == ("130m", "1.4b")
    assert (options.budget, options.alone) == (2.0, False)
    assert tyro.cli(command.Options, args=["scan"]).peers is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (command.Options("scan", shape=("1,x",)), "shape"),
        (command.Options("scan", device="tape"), "device"),
        (command.Options("scan", threads=0), "threads"),
        (command.Options("scan", shape=("1,2",), device="cpu"), "expected 4 positive integers"),
        (command.Options("memory", device="cpu"), "NVIDIA GPUs"),
        (command.Options("train", shape=("1,8,9,1,2",), size=("130m",), device="cpu"), "leave one of the two out"),
    ],
)
def test_bad_options_are_named(options: command.Options, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        command.run(options, Console(quiet=True))
