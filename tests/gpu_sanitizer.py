"""Runs a few of the `gpu`-marked tests under compute-sanitizer and writes what it found to a JSON file.

    python tests/gpu_sanitizer.py [--out results/gpu/sanitizer.json]

memcheck looks for accesses outside what was allocated, racecheck for hazards between threads in shared memory. Both
slow a kernel down by far, so each operator is represented by the cases that between them take every branch. Under
memcheck PyTorch asks CUDA for every tensor by itself: in its own pool one tensor's end is another's beginning. What is
found in the kernels of cuBLAS is counted apart: its products meet in ways that racecheck does not know. The exit status
is 1 if anything was found elsewhere, or a test failed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.gpu_report import machine  # noqa: E402

TOOLS = ("memcheck", "racecheck")

#: How the names of cuBLAS's kernels begin.
VENDORS = ("nvjet", "cublas", "cutlass", "sm80_xmma", "sm90_xmma")

#: Operator: its tests, and which of them.
OPERATORS = {
    "selective_scan": (
        "ops/selective_scan/test_backends.py",
        "float64_definition and cuda-gpu and (mamba or packed-states or groups-3-odd or complex-packed or constant-b-c)"
        " and not float16-",
    ),
    "selective_scan in pieces": ("ops/selective_scan/test_cuda.py", "every_plan and (odd or packed)"),
    "causal_conv1d": (
        "ops/causal_conv1d/test_backends.py",
        "float64_definition and cuda-gpu and (mamba or packed-states or width-7 or odd)",
    ),
    "add_rms_norm": ("ops/add_rms_norm/test_backends.py", "float64_definition and gpu and (-block or odd or many)"),
    "linear_cross_entropy": (
        "ops/linear_cross_entropy/test_backends.py",
        "torch_in_float64 and gpu and pieces and mean",
    ),
    "linear_scan": (
        "ops/linear_scan/test_backends.py",
        "float64_definition and float32-triton-gpu and (real or complex or one-step or wide or packed-states)",
    ),
    "decay_attention": (
        "ops/decay_attention/test_backends.py",
        "float64_definition and triton and bfloat16 and (step or retention or long) and not one-stretch",
    ),
    "vandermonde": ("ops/vandermonde/test_backends.py", "test_triton and gpu"),
    "cauchy": ("ops/cauchy/test_backends.py", "float32 and triton-gpu"),
    "mamba_step": ("ops/mamba_step/test_cuda.py", "agrees and (even-float16 or even-narrow or odd) and (-1 or -5)"),
}


def sanitizer() -> str:
    """Where compute-sanitizer is."""
    found = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(found).exists():
        raise SystemExit("compute-sanitizer, of the CUDA toolkit, is not installed")
    return found


def check(operator: str, tool: str, seconds: float) -> dict[str, Any]:
    """One operator's tests under one tool."""
    file, chosen = OPERATORS[operator]
    pytest = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-n", "0", "-m", "gpu", "-k", chosen]
    # PyTorch asks the driver for more than some machines have, and lives with the answer.
    command = [sanitizer(), "--tool", tool, "--report-api-errors", "no", *pytest, str(ROOT / "tests" / file)]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if tool == "memcheck" else None
    started = time.monotonic()
    try:
        run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds)
        said, ended = run.stdout + run.stderr, run.returncode == 0
    except subprocess.TimeoutExpired as late:
        said, ended = (late.stdout or b"").decode(errors="replace"), False
    summary = re.findall(r"=+ (?:ERROR|RACECHECK) SUMMARY: (.*)", said)
    tests = re.findall(r"((?:\d+ \w+(?:, )?)+) in [\d.]+s", said)
    # A race is reported with both of its accesses, anything else with the place where it happened.
    kernels = Counter(re.findall(r"(?:between (?:Read|Write) access| at) (?:at )?([\w<>:, ]+)\+0x", said))
    harmless = (
        all(name.startswith(VENDORS) for name in kernels) if kernels else bool(summary) and summary[-1][:2] == "0 "
    )
    found: dict[str, Any] = {
        "operator": operator,
        "tool": tool,
        "clean": ended and bool(tests) and harmless,
        "summary": summary[-1] if summary else None,
        "kernels": dict(kernels),
        "tests": tests[-1] if tests else None,
        "seconds": round(time.monotonic() - started, 1),
    }
    if not found["clean"]:
        found["output"] = said[-6000:]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "gpu" / "sanitizer.json")
    parser.add_argument("--operators", nargs="+", choices=OPERATORS, default=list(OPERATORS))
    parser.add_argument("--seconds", type=float, default=110.0, help="that one operator may take under one tool")
    options = parser.parse_args()
    pairs = [(operator, tool) for operator in options.operators for tool in TOOLS]
    with ThreadPoolExecutor(len(pairs)) as pool:
        runs = list(pool.map(lambda pair: check(*pair, options.seconds), pairs))
    report = {"when": datetime.now(timezone.utc).isoformat(timespec="seconds"), "machine": machine(), "runs": runs}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    for run in runs:
        verdict = "clean" if run["clean"] else "NOT CLEAN"
        sys.stdout.write(f"{run['operator']}, {run['tool']}: {verdict}, {run['tests']}, {run['seconds']} s\n")
    return 0 if all(run["clean"] for run in runs) else 1


if __name__ == "__main__":
    sys.exit(main())
