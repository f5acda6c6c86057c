"""Every target of the fuzzer takes sound files, and survives a moment of it; ``-m soak`` gives each ten minutes."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fuzz.targets import TARGETS
from tests.soak import record

ROOT = Path(__file__).resolve().parents[2]
MINUTES = float(os.environ.get("LONGSCAN_MINUTES", "10"))
fuzzed = pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="needs atheris (the extra fuzz)")


@pytest.mark.parametrize("name", TARGETS)
def test_sound_files_are_read(tmp_path: Path, name: str) -> None:
    """And what is nothing, or cut short, is refused in words."""
    if name == "tokenizers":
        pytest.importorskip("tokenizers")
    target = TARGETS[name](tmp_path)
    for content in (*target.seeds, b"", *(seed[:-3] for seed in target.seeds)):
        target.read(content)


def fuzz(folder: Path, name: str, *options: str) -> dict[str, Any]:
    """Run the fuzzer on a target: what it did, and what it found (bytes, and what happened)."""
    command = [sys.executable, "-m", "tests.fuzz.targets", name, f"-artifact_prefix={folder}/", *options]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), *sys.path])}
    done = subprocess.run(
        [*command, "-print_final_stats=1", str(folder)], cwd=ROOT, env=environment, capture_output=True, check=False
    )
    said = done.stderr.decode(errors="replace")
    findings = [path.read_bytes() for pattern in ("crash-*", "timeout-*", "oom-*") for path in folder.glob(pattern)]
    assert findings or done.returncode == 0, said[-3000:]
    number = re.findall(r"stat::number_of_executed_units: *(\d+)", said)
    coverage = re.findall(r"cov: (\d+)", said)
    return {
        "executions": int(number[-1]),
        "edges": int(coverage[-1]),
        "findings": [repr(content[:500]) for content in findings],
        "said": said[-3000:] if findings else "",
    }


@fuzzed
@pytest.mark.parametrize("name", TARGETS)
def test_a_moment_of_fuzzing(tmp_path: Path, name: str) -> None:
    found = fuzz(tmp_path, name, "-runs=300", "-max_total_time=2")
    assert not found["findings"], found
    assert found["executions"] > 1


@pytest.fixture(scope="module")
def soaked() -> Iterator[dict[str, Any]]:
    """What the soak does and finds, by target."""
    found: dict[str, Any] = {}
    yield found
    if found:
        sums = {key: sum(each[key] for each in found.values()) for key in ("executions", "seconds")}
        record("fuzz", sums | {"findings": sum(len(each["findings"]) for each in found.values()), "targets": found})


@fuzzed
@pytest.mark.soak
@pytest.mark.parametrize("name", TARGETS)
def test_minutes_of_fuzzing(tmp_path: Path, name: str, soaked: dict[str, Any]) -> None:
    seconds = round(60 * MINUTES)
    soaked[name] = {"seconds": seconds} | fuzz(tmp_path, name, f"-max_total_time={seconds}")
    assert not soaked[name]["findings"], soaked[name]
