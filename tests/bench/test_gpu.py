"""Every benchmark in miniature on an NVIDIA GPU: figures, no failures, and memory that was seen."""

from __future__ import annotations

import importlib

import pytest

from longscan.bench import Settings

pytestmark = pytest.mark.gpu

SHAPES = {
    "scan": ((2, 256, 128, 16),),
    "block": ((2, 64, 128),),
    "train": ((2, 128, 50, 2, 192),),
    "prefill": ((2, 128, 50, 64),),
    "decode": ((2, 128, 50, 1, 8), (2, 128, 50, 5, 8)),
    "lengths": ((4, 256, 128, 16), (1, 1024, 128, 16)),
    "throughput": ((2, 128, 50, 1, 32, 8), (2, 128, 50, 3, 32, 8)),
    "memory": ((2, 128, 50, 1, 64), (2, 128, 50, 2, 64)),
}


@pytest.mark.parametrize("name", SHAPES)
def test_runs(name: str) -> None:
    settings = Settings(device="cuda", shapes=SHAPES[name], dtypes=("bfloat16",), repeats=2, budget=0.5)
    report = importlib.import_module(f"longscan.bench.{name}").run(settings)
    assert report.failed == []
    for row in report.rows:
        if row.kind == "peer" and row.contender not in ("unfused", "mamba-ssm", "longscan-compiled"):
            continue  # not everybody takes bfloat16
        assert row.value is not None, f"{row.contender}: {row.note}"
        assert row.value > 0
        assert "launches included" not in row.note or row.kind != "ours"
        counted = row.kind != "floor" and row.contender != "longscan-captured"
        assert not counted or (row.memory is not None and row.memory > 0)
