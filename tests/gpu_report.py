"""Runs every `gpu`-marked test and writes what happened to a JSON file.

    python tests/gpu_report.py [--out results/gpu/tests.json] [arguments for pytest ...]

Compilation takes most of the time: with pytest-xdist, add `-n 8`. The exit status is pytest's.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent


def machine() -> dict[str, Any]:
    """What the figures depend on: device, driver's CUDA, versions, commit."""
    import torch
    import triton

    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    available = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if available else None,
        "capability": list(torch.cuda.get_device_capability()) if available else None,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": sys.version.split()[0],
        "commit": git.stdout.strip() or None,
    }


def outcome(case: ElementTree.Element) -> str:
    """passed, failed, error or skipped, of one test of a JUnit report."""
    for tag, word in (("failure", "failed"), ("error", "error"), ("skipped", "skipped")):
        if case.find(tag) is not None:
            return word
    return "passed"


def read_report(path: Path) -> list[dict[str, Any]]:
    """The tests of a JUnit report: name, outcome, seconds and, of those that failed, the message."""
    tests = []
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        test: dict[str, Any] = {
            "name": f"{case.get('classname')}::{case.get('name')}",
            "outcome": outcome(case),
            "seconds": float(case.get("time", "0")),
        }
        fault = case.find("failure") if case.find("failure") is not None else case.find("error")
        if fault is not None:
            test["message"] = (fault.get("message") or "")[:2000]
        tests.append(test)
    return tests


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "gpu" / "tests.json")
    options, passed_on = parser.parse_known_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        xml = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-m", "gpu", f"--junitxml={xml}", *passed_on]
        status = subprocess.run(command, cwd=ROOT).returncode
        tests = read_report(xml) if xml.exists() else []
    counts = {word: sum(t["outcome"] == word for t in tests) for word in ("passed", "failed", "error", "skipped")}
    report = {
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
        "seconds": round(time.monotonic() - started, 1),
        "counts": counts,
        "tests": tests,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
