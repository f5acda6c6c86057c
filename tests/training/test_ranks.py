"""Two processes under torchrun give the losses of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from longscan.errors import ConfigError
from longscan.training.distributed import join


@pytest.mark.parametrize("flags", [[], ["--carry-state", "--accumulate", "2"]], ids=["plain", "carried"])
def test_two_ranks_equal_one(tmp_path: Path, flags: list[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{i} squared is {i * i}\n" for i in range(2000)))
    common = ["train", "text", "--data", str(text), "--steps", "4", "--d-model", "16", "--n-layer", "1"]
    common += ["--batch-size", "8", "--sequence-length", "32", "--sample", "0", "--device", "cpu"]
    common += ["--precision", "float32", "--evaluations", "0", "--runs", str(tmp_path), *flags]
    environment = os.environ | {"LONGSCAN_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    one = [sys.executable, "-m", "longscan", *common, "--name", "one"]
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    two += ["-m", "longscan", *common, "--name", "two"]
    losses = []
    for name, command in (("one", one), ("two", two)):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        losses.append([row["loss"] for row in rows])
    assert len(losses[0]) == 4
    assert losses[0] == pytest.approx(losses[1], rel=2e-5)


def test_an_incomplete_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ConfigError, match=r"RANK.*torchrun"), join("cpu"):
        pass
